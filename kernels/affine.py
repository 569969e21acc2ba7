"""Affine maps of a recurrent state, `S_out = M S_in + S_loc`, and how `M` acts: what splitting a sequence stands on.

`(M2, S2) after (M1, S1) = (M2 M1, M2 S1 + S2)` is associative, so the summaries of stretches of a sequence can be
joined in any order. Each operator declares its transition class, the shape that its `M` has:

| class    | state S         | M            | operators                                      |
| -------- | --------------- | ------------ | ---------------------------------------------- |
| SCALAR   | `(B, H, P, N)`  | `(B, H)`     | SSD (Mamba-2), retention                       |
| DIAGONAL | `(B, ..., N)`   | like S, or 1 | Mamba-1, gated linear attention, S4D           |
| DENSE    | `(B, H, K, V)`  | `(B, H, K, K)` | delta rule: products of identity minus rank one |
"""

from dataclasses import dataclass

import torch
from torch import Tensor


# An operator of its own: selective recomputation counts the calls of plain products, and an exchange whose result is
# remembered is not called again.
@torch.library.custom_op("headrace::transition_product", mutates_args=())
def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@_matrix_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


@dataclass(frozen=True)
class Transition:
    """A transition class: how its `M` acts on a state, and how two of them multiply.

    Args:
        dense: `M` is a matrix for each head; else it is multiplied elementwise, missing last dims being alike.
    """

    dense: bool = False

    def apply(self, M: Tensor, S: Tensor) -> Tensor:
        """`M S`."""
        return _matrix_product(M, S) if self.dense else M.view(*M.shape, *(1,) * (S.dim() - M.dim())) * S

    def multiply(self, M2: Tensor, M1: Tensor) -> Tensor:
        """`M2 M1`, the transition of the earlier stretch 1 and the later stretch 2 together."""
        return _matrix_product(M2, M1) if self.dense else M2 * M1

    def adjoint(self, M: Tensor) -> Tensor:
        """The transpose, by which gradients travel back through a stretch."""
        return M.mT if self.dense else M

    def gradient(self, dS_out: Tensor, S_in: Tensor, like: Tensor) -> Tensor:
        """The gradient of `M`, in the shape of `like`, from those of `M S_in`."""
        if self.dense:
            return dS_out @ S_in.mT
        return (dS_out * S_in).sum_to_size(*like.shape, *(1,) * (S_in.dim() - like.dim())).view(like.shape)

    def compose(self, later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The summary `(M, S)` of two neighbouring stretches together."""
        (M2, S2), (M1, S1) = later, earlier
        return self.multiply(M2, M1), self.apply(M2, S1) + S2


SCALAR = DIAGONAL = Transition()
DENSE = Transition(dense=True)
