"""The Triton path over segments of sequences whose entering states come from elsewhere.

Forward, a cheap kernel gives each segment's summary `(M, S_loc)`; an exchange turns all summaries into entering states,
and the fused scan runs from those. Backward is the mirror: what outputs give to the gradient of the entering state, the
reverse exchange, and the fused backward from the gradients that arrive at the segments' ends.
"""

from typing import Any

import torch
from torch import Tensor

from ...numerics import one_operator
from .decays import FusedDecays
from .path import (
    FusedInputs,
    Shared,
    prepare,
    ssd_fused_backward,
    ssd_fused_forward,
    ssd_fused_reverse_summary,
    ssd_fused_summary,
)


class FusedSegmented(torch.autograd.Function):
    """`ssd_segments` in Triton: `apply(x, dt, A, B, C, D, reset, segments, exchange) -> y_BLHP`."""

    @staticmethod
    @one_operator()
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Collective wherever the exchange is."""
        *tensors, places, exchange = args
        segments = [_segment(tensors, place) for place in places]
        shared = [prepare(segment) for segment in segments]
        summaries = [ssd_fused_summary(*pair) for pair in zip(segments, shared, strict=True)]
        M, S = ([summary[index] for summary in summaries] for index in range(2))
        pending = exchange.start(M, S)
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for segment, own, m_BH, entering in zip(segments, shared, M, pending.wait(), strict=True):
            y, _, states = ssd_fused_forward(segment, entering, own, keep=True)
            assert y is not None
            outputs.append(y)
            kept += [*own.decays, own.products, states, entering, m_BH]
        ctx.save_for_backward(*tensors, *kept)
        ctx.plans = [own.plan for own in shared]
        ctx.places, ctx.exchange = places, exchange
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    @staticmethod
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor | None, ...]:
        """Collective wherever the exchange is."""
        saved = ctx.saved_tensors
        tensors, kept = saved[:7], saved[7:]
        size = len(kept) // len(ctx.places)
        per_segment = [kept[i : i + size] for i in range(0, len(kept), size)]
        shared = [Shared(p, FusedDecays(*k[:-4]), k[-4]) for p, k in zip(ctx.plans, per_segment, strict=True)]
        all_states, entered, M = zip(*(k[-3:] for k in per_segment), strict=True)
        segments = [_segment(tensors, place) for place in ctx.places]
        dys = [dy_BLHP[:, place].contiguous() for place in ctx.places]
        arriving = [ssd_fused_reverse_summary(*of) for of in zip(dys, segments, shared, strict=True)]
        pending = ctx.exchange.start(list(M), arriving, reverse=True)
        per_token: list[list[Tensor]] = [[], [], [], []]
        dA, dD = None, None
        given = (dys, segments, shared, all_states, entered, pending.wait())
        for dy, segment, own, states, entering, dleaving in zip(*given, strict=True):
            dx, grads, _ = ssd_fused_backward(dy, dleaving, segment, entering, states, own)
            for parts, part in zip(per_token, (dx, grads.dt_BLH, grads.B_BLGN, grads.C_BLGN), strict=True):
                assert part is not None
                parts.append(part)
            dA = grads.A_H if dA is None else dA + grads.A_H
            if grads.D is not None:
                dD = grads.D if dD is None else dD + grads.D
        dx, ddt, dB, dC = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in per_token)
        return dx, ddt, dA, dB, dC, dD, None, None, None


def _segment(tensors: Any, place: slice) -> FusedInputs:
    x, dt, A, B, C, D, reset = tensors
    return FusedInputs(
        x[:, place], dt[:, place], A, B[:, place], C[:, place], D, None if reset is None else reset[:, place]
    )
