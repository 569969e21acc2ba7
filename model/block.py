"""A residual layer."""

from torch import Tensor, nn

from .norms import RMSNorm
from .sequence import SequenceContext


class Block(nn.Module):
    """`mixer(norm(x))`, to be added to the residual stream `x`. The unit of sharding and of activation recomputation.

    The next block adds it, in one operator with its norm: the stream is read and written once less.
    """

    def __init__(self, mixer: nn.Module, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer

    def forward(self, x_BLD: Tensor, seq: SequenceContext, update_BLD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the residual stream plus the last layer's `update`, in the wider dtype, and this layer's update."""
        normed_BLD, x_BLD = self.norm(x_BLD, update_BLD)
        return x_BLD, self.mixer(normed_BLD, seq)
