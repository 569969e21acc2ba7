"""Linear cross-entropy, a chunk of tokens at a time: logits, probabilities and gradients share one buffer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import compute_dtype


class SoftmaxSums(NamedTuple):
    """What the loss of tokens needs of their logits, `(T, 1)` each: the largest, the sum of `exp(logit - largest)`, and
    the target's logit, 0 where it is not among them."""

    peak: Tensor
    total: Tensor
    chosen: Tensor


Combine = Callable[[SoftmaxSums], SoftmaxSums]


def _loss_of_chunk(
    logits: Tensor, target: Tensor, counted: Tensor, z_loss: float, with_gradient: bool, combine: Combine | None
) -> Tensor:
    """Return the loss sum of one chunk; `logits` are overwritten, by its gradient to them if asked.

    With `combine`, which adds the sums of the logits kept elsewhere, a target may lie outside these.
    """
    index, here = target[:, None], None
    if combine is not None:
        here = (index >= 0) & (index < logits.shape[1])
        index = index.masked_fill(~here, 0)
    chosen = logits.gather(1, index)
    peak = logits.amax(1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    target_weight = -counted
    if combine is not None and here is not None:
        own_peak = peak
        peak, total, chosen = combine(SoftmaxSums(peak, total, chosen.masked_fill(~here, 0.0)))
        weights.mul_((own_peak - peak).exp())
        target_weight = target_weight * here
    log_total = total.log().add_(peak)
    loss = log_total - chosen
    if z_loss:
        loss = loss + z_loss * log_total.square()
    if with_gradient:
        scale = counted / total
        if z_loss:
            scale = scale * (1 + 2 * z_loss * log_total)
        weights.mul_(scale).scatter_add_(1, index, target_weight)
    return (loss * counted).sum()


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
    first_row: int = 0,
    combine: Combine | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss sum, the number of targets, and the gradients of the sum to `x` and `weight`, empty if not asked.

    `weight` may be a part of a head, from `first_row` on; `combine` then joins the parts' sums. Arguments otherwise as
    in `linear_cross_entropy`.
    """
    dtype = compute_dtype(x_TD)
    loss_sum = x_TD.new_zeros((), dtype=dtype)
    dx_TD = x_TD.new_empty(x_TD.shape if grad_x else 0)
    dweight_VD = weight_VD.new_zeros(weight_VD.shape if grad_weight else 0, dtype=dtype)
    num_targets = (target_T != ignore_index).sum()
    for start in range(0, x_TD.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        x, target = x_TD[part], target_T[part]
        counted = target != ignore_index
        logits = (x @ weight_VD.t()).to(dtype)
        target = target.masked_fill(~counted, 0) - first_row
        loss_sum += _loss_of_chunk(logits, target, counted[:, None].to(dtype), z_loss, grad_x or grad_weight, combine)
        dlogits = logits.to(x.dtype)
        if grad_x:
            torch.mm(dlogits, weight_VD, out=dx_TD[part])
        if grad_weight and x.dtype == dtype:
            dweight_VD.addmm_(dlogits.t(), x)
        elif grad_weight:
            dweight_VD += dlogits.t() @ x
    return loss_sum, num_targets, dx_TD, dweight_VD.to(weight_VD.dtype)
