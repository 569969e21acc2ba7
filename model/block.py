"""A residual layer."""

from torch import Tensor, nn

from .norms import RMSNorm
from .sequence import SequenceContext


class Block(nn.Module):
    """`x + mixer(norm(x))`. The unit of sharding and of activation recomputation.

    Nothing outside it but its input and the sequence context is needed to compute it again.
    """

    def __init__(self, mixer: nn.Module, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Add the layer's output to the residual stream, in the wider of the two dtypes."""
        return x_BLD + self.mixer(self.norm(x_BLD), seq)
