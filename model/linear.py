"""Linear maps whose parameters hold NaN until they are initialised or loaded, and several of them as one product."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import embedding
from .sequence import SequenceContext


class Linear(nn.Linear):
    """`nn.Linear` that starts as NaN, so that a forgotten initialisation shows at once."""

    def reset_parameters(self) -> None:
        """Fill with NaN; the real first values come from the owner's `parameter_rules`."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


class Embedding(nn.Embedding):
    """`nn.Embedding`, without its options, that starts as NaN and whose gradient is the same bits every time."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)

    def reset_parameters(self) -> None:
        """Fill with NaN; the real first values come from the owner's `parameter_rules`."""
        nn.init.constant_(self.weight, float("nan"))

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows of the weight that `tokens` number."""
        return embedding(tokens, self.weight)


class PartialLinear(nn.Module):
    """The weight (F, I) of a map whose outputs its owner goes on with as a whole, though its inputs may be cut.

    Applied by `joined_partial`: where each rank has a part of the inputs, its outputs are but terms of a sum.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((out_features, in_features), float("nan")))


def joined_partial(x_BLI: Tensor, maps: tuple[PartialLinear, ...]) -> Tensor:
    """The outputs of maps of one input side by side on the last dim, as one product.

    The seam through which tensor parallelism, whose inputs are this rank's channels, sums the outputs over ranks.
    """
    return F.linear(x_BLI, torch.cat([each.weight for each in maps]))


def join(group: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several maps of one input as one map, their outputs side by side.

    The parameters stay separate, so that each can be sharded and saved on its own.
    """
    if len(group) == 1:
        return group[0].weight, group[0].bias
    biases: list[Tensor] = [linear.bias for linear in group if linear.bias is not None]
    return torch.cat([linear.weight for linear in group]), torch.cat(biases) if biases else None


def joined_linear(x_BLD: Tensor, groups: tuple[tuple[nn.Linear, ...], ...], seq: SequenceContext) -> tuple[Tensor, ...]:
    """One output per group: the outputs of the group's maps side by side on the last dim. All maps share the input.

    The seam through which tensor parallelism gathers its input; `seq` then tells the shape of what is gathered.
    """
    return tuple(F.linear(x_BLD, *join(group)) for group in groups)
