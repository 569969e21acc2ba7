"""From some tokens' logits to their losses and, in the same memory, gradients: what is asked, and the PyTorch path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..numerics import compute_dtype


class SoftmaxSums(NamedTuple):
    """What the loss of tokens needs of their logits, `(T, 1)` each: the largest, the sum of `exp(logit - largest)`, and
    the target's logit, 0 where it is not among them."""

    peak: Tensor
    total: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class HeadShard:
    """Which rows of a head are here.

    Args:
        first_row: the number of the first.
        whole_rows: how many the whole head has.
        combine: joins the sums of these rows' logits with those of all others.
    """

    first_row: int
    whole_rows: int
    combine: Callable[[SoftmaxSums], SoftmaxSums]


@dataclass(frozen=True)
class LossRules:
    """What is asked of every chunk of tokens; `shard` is None where the head is whole."""

    ignore_index: int
    z_loss: float
    with_gradient: bool
    shard: HeadShard | None = None


# (x_TD, weight_VD, target_T, loss_T, rules) -> dlogits_TV: writes the loss of each token to `loss_T` and returns the
# gradients of their sum to the logits, in the dtype of `x`; anything where no gradient is asked for.
RowStep = Callable[[Tensor, Tensor, Tensor, Tensor, LossRules], Tensor]


def plain_rows(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, loss_T: Tensor, rules: LossRules) -> Tensor:
    """The step (`RowStep`) in PyTorch; logits, probabilities and gradients share one buffer."""
    shard, dtype = rules.shard, compute_dtype(x_TD)
    counted = (target_T != rules.ignore_index)[:, None]
    index, here = target_T[:, None].masked_fill(~counted, 0), None
    logits = (x_TD @ weight_VD.t()).to(dtype)
    if shard is not None:
        known = (index >= 0) & (index < shard.whole_rows)
        index = index - shard.first_row
        here = (index >= 0) & (index < logits.shape[1])
        index = index.masked_fill(~here, 0)
    weight = counted.to(dtype)
    target_weight = -weight
    chosen = logits.gather(1, index)
    peak = logits.amax(1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    if shard is not None and here is not None:
        own_peak = peak
        total = total.masked_fill(~known, float("nan"))
        peak, total, chosen = shard.combine(SoftmaxSums(peak, total, chosen.masked_fill(~here, 0.0)))
        weights.mul_((own_peak - peak).exp())
        target_weight = target_weight * here
    log_total = total.log()
    loss = log_total + (peak - chosen)
    scale = weight / total
    if rules.z_loss:
        log_sum = log_total + peak
        loss = loss + rules.z_loss * log_sum.square()
        scale = scale * (1 + 2 * rules.z_loss * log_sum)
    loss_T.copy_((loss * weight)[:, 0])
    if not rules.with_gradient:
        return logits
    return weights.mul_(scale).scatter_add_(1, index, target_weight).to(x_TD.dtype)
