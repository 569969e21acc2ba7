"""Linear maps whose parameters hold NaN until they are initialised or loaded, and several of them as one product."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """`nn.Linear` that starts as NaN, so that a forgotten initialisation shows at once."""

    def reset_parameters(self) -> None:
        """Fill with NaN; the real first values come from the owner's `parameter_rules`."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


class Embedding(nn.Embedding):
    """`nn.Embedding` that starts as NaN."""

    def reset_parameters(self) -> None:
        """Fill with NaN; the real first values come from the owner's `parameter_rules`."""
        nn.init.constant_(self.weight, float("nan"))


def joined_linear(x_BLD: Tensor, groups: tuple[tuple[nn.Linear, ...], ...]) -> tuple[Tensor, ...]:
    """One output per group: the outputs of the group's maps side by side on the last dim. All maps share the input.

    The parameters stay separate, so that each can be sharded and saved on its own. The seam through which tensor
    parallelism gathers its input.
    """
    outputs = []
    for group in groups:
        if len(group) == 1:
            outputs.append(group[0](x_BLD))
            continue
        weight = torch.cat([linear.weight for linear in group])
        biases: list[Tensor] = [linear.bias for linear in group if linear.bias is not None]
        outputs.append(F.linear(x_BLD, weight, torch.cat(biases) if biases else None))
    return tuple(outputs)
