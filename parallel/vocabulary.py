"""Output head and cross-entropy with the vocabulary shared out over ranks: logits stay where they are computed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.dispatch import choose_backend
from ..kernels.losses.chunked import linear_cross_entropy_forward
from ..kernels.losses.operator import obstacle_of, scale_gradient, tokens_at_a_time
from ..kernels.losses.rows import HeadShard, SoftmaxSums
from .comm import gather_stack


def vocabulary_loss(
    x_TD: Tensor, weight_vD: Tensor, target_T: Tensor, group: dist.ProcessGroup, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of tokens that every rank holds; rank r has the r-th share of the head's rows.

    Three numbers per token are exchanged. The gradient to `x` is this rank's rows' share of it. A target that no rank
    has makes the loss and the gradients NaN. `backend` as in `kernels.dispatch`; there is no shared definition, so
    `reference` takes PyTorch. Collective.
    """
    fused = choose_backend("vocabulary_loss", backend, x_TD, obstacle_of(weight_vD)) == "triton"
    loss_sum, num_targets = _VocabularyLoss.apply(x_TD, weight_vD, target_T, group, fused)
    return loss_sum, num_targets


class _VocabularyLoss(torch.autograd.Function):
    """Gradients are ready when the loss is; backward only scales, and sends nothing."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_vD: Tensor, target_T: Tensor, group: dist.ProcessGroup, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """One all-gather for each chunk of tokens."""
        rows, ranks = len(weight_vD), dist.get_world_size(group)
        loss_sum, num_targets, dx_TD, dweight_vD = linear_cross_entropy_forward(
            x_TD,
            weight_vD,
            target_T,
            ignore_index=-100,
            chunk_size=tokens_at_a_time(x_TD, rows),
            z_loss=0.0,
            grad_x=ctx.needs_input_grad[0],
            grad_weight=ctx.needs_input_grad[1],
            shard=HeadShard(dist.get_rank(group) * rows, ranks * rows, lambda mine: _combine(mine, group)),
            fused=fused,
        )
        ctx.fused = fused
        ctx.mark_non_differentiable(num_targets)
        ctx.save_for_backward(dx_TD, dweight_vD)
        return loss_sum, num_targets

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale, in the dtype of the loss."""
        dx, dweight = (
            scale_gradient(grad, dloss, ctx.fused) if wanted else None
            for grad, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        )
        return dx, dweight, None, None, None


def _combine(mine: SoftmaxSums, group: dist.ProcessGroup) -> SoftmaxSums:
    peak, total, chosen = gather_stack(torch.cat(mine, 1)[None], group).unbind(-1)
    highest = peak.amax(0)
    return SoftmaxSums(*(v[:, None] for v in (highest, (total * (peak - highest).exp()).sum(0), chosen.sum(0))))
