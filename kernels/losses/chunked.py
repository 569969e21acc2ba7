"""Linear cross-entropy, a chunk of tokens at a time: matrix products around what turns logits into gradients."""

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .rows import HeadShard, LossRules, RowStep, plain_rows


def linear_cross_entropy_forward(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    chunk_size: int,
    z_loss: float,
    grad_x: bool,
    grad_weight: bool,
    *,
    shard: HeadShard | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss sum, the number of targets, and the gradients of the sum to `x` and `weight`, empty if not asked.

    With `shard`, `weight` is a part of a head, and the gradient to `x` that part's share. `fused` takes the Triton
    kernels between the products. Arguments otherwise as in `linear_cross_entropy`.
    """
    dtype, num_tokens = compute_dtype(x_TD), len(x_TD)
    rules = LossRules(ignore_index, z_loss, grad_x or grad_weight, shard)
    step = _fused_step() if fused else plain_rows
    loss_T = x_TD.new_empty(num_tokens, dtype=dtype)
    dx_TD = x_TD.new_empty(x_TD.shape if grad_x else 0)
    dweight_VD = weight_VD.new_empty(weight_VD.shape if grad_weight else 0, dtype=dtype)
    if num_tokens == 0:
        dweight_VD.zero_()
    for start in range(0, num_tokens, chunk_size):
        part = slice(start, start + chunk_size)
        dlogits = step(x_TD[part], weight_VD, target_T[part], loss_T[part], rules)
        if grad_x:
            torch.mm(dlogits, weight_VD, out=dx_TD[part])
        if grad_weight:
            _add_product(dweight_VD, dlogits.t(), x_TD[part], first=start == 0)
        del dlogits  # the next chunk takes its memory
    return loss_T.sum(), (target_T != ignore_index).sum(), dx_TD, dweight_VD.to(weight_VD.dtype)


def _fused_step() -> RowStep:
    from .fused import fused_rows

    return fused_rows


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add `a @ b` to `total`, which the first product overwrites; in the dtype of `total` where the device can."""
    kept = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=kept)
    elif total.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, a, b, beta=kept, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
