"""SSD over segments of sequences whose entering states come from elsewhere, and arrive while the work is under way.

The chunked form falls into what needs the entering state and what does not. Forward: chunk states from zero give each
segment's summary `(M, S_loc)`; while an exchange turns all segments' summaries into entering states, the products
within chunks are computed; then the entering states are folded into the chunk states, and these into the outputs.
Backward is the mirror: what the outputs give to the entering states, the reverse exchange, the products within
chunks meanwhile, then what the leaving states give to the tokens. Nothing is computed twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import one_operator
from .chunked import (
    add_entering_state,
    add_output_of_states,
    join_chunks,
    output_of_chunks,
    output_within_chunks,
    scan_in_place,
    states_entering_chunks,
    states_from_groups,
    states_to_groups,
)
from .chunked_backward import (
    Gradients,
    Inputs,
    empty_gradients,
    through_decays,
    through_entering_states,
    through_leaving_states,
    within_chunks,
)
from .exchange import Exchange
from .fused_operator import check_layout, fused_obstacle
from .layout import Chunks, Decays, compute_decays, cut, cut_into_chunks
from .scan import check_arguments


class Segment:
    """One segment's chunks and decays, computed from its slice of the inputs."""

    def __init__(self, inputs: Inputs, place: slice, chunk_size: int) -> None:
        x, dt, A_H, B, C, _, _, reset = inputs
        assert C is not None
        reset = None if reset is None else reset[:, place]
        self.place, self.like = place, x[:, place]
        self.chunks: Chunks = cut_into_chunks(self.like, dt[:, place], B[:, place], C[:, place], reset, chunk_size)
        self.decays: Decays = compute_decays(self.chunks.dt_nQH, A_H, self.chunks.reset_nQ)

    def transition(self) -> Tensor:
        """`M`, what the segment leaves of a state that enters it, `(B, H)`."""
        return self.decays.through_nH.unflatten(0, (self.chunks.num_rows, -1)).prod(1)


def ssd_segments(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None,
    *,
    segments: Sequence[slice],
    exchange: Exchange,
    reset: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Tensor:
    """`ssd_scan` of the segments that a process holds, one behind the other along L, none of them empty.

    Arguments otherwise as in `ssd_scan`. Returns `y_BLHP`; the first segment of a sequence begins with a zero state.
    Gradients flow to all tensors but `reset`, those of other processes' segments included. Collective wherever
    `exchange` is, forward and backward.
    """
    check_arguments(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, None, reset, chunk_size)
    backend = choose_backend("ssd_segments", backend, x_BLHP, fused_obstacle(x_BLHP, B_BLGN))
    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, reset)
    if backend == "reference":
        raise ValueError("ssd_segments: the recurrence itself has no segments; ask for backend 'torch' or 'auto'")
    if backend == "triton":
        from .fused.segments import FusedSegmented

        check_layout(x_BLHP, dt_BLH, B_BLGN, C_BLGN)
        return FusedSegmented.apply(*tensors, tuple(segments), exchange)
    return _Segmented.apply(*tensors, tuple(segments), exchange, chunk_size)


class _Segmented(torch.autograd.Function):
    @staticmethod
    @one_operator()
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, dt, A_H, B, C, D, reset, places, exchange, chunk_size = args
        inputs = Inputs(x, dt, A_H, B, C, D, None, reset)
        segments = [Segment(inputs, place, chunk_size) for place in places]
        states, leaving = zip(*(states_entering_chunks(s.chunks, s.decays, None) for s in segments), strict=True)
        pending = exchange.start([s.transition() for s in segments], list(leaving))
        meanwhile = [None if pending.done else output_within_chunks(s.chunks, s.decays, D) for s in segments]
        outputs = []
        for segment, own, y_nQHP, entering in zip(segments, states, meanwhile, pending.wait(), strict=True):
            chunks, decays = segment.chunks, segment.decays
            add_entering_state(chunks, decays, own, entering)
            if y_nQHP is None:
                y_nQHP = output_of_chunks(chunks, decays, own, D)
            else:
                add_output_of_states(chunks, decays, own, y_nQHP)
            outputs.append(y_nQHP)
        ctx.save_for_backward(x, dt, A_H, B, C, D, reset, *states)
        ctx.places, ctx.exchange, ctx.chunk_size = places, exchange, chunk_size
        joined = [join_chunks(y, s.like) for y, s in zip(outputs, segments, strict=True)]
        return joined[0] if len(joined) == 1 else torch.cat(joined, 1)

    @staticmethod
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A_H, B, C, D, reset, *states = ctx.saved_tensors
        inputs = Inputs(x, dt, A_H, B, C, D, None, reset)
        segments = [Segment(inputs, place, ctx.chunk_size) for place in ctx.places]
        dys = [cut(dy_BLHP[:, s.place], s.chunks.x_nQHP.shape[1]) for s in segments]
        grads = [empty_gradients(s.chunks) for s in segments]
        dstates, arriving = [], []
        for segment, own, dy, grad in zip(segments, states, dys, grads, strict=True):
            dstate, dentering = _to_entering_state(segment, own, dy, grad)
            dstates.append(dstate)
            arriving.append(dentering)
        pending = ctx.exchange.start([s.transition() for s in segments], arriving, reverse=True)
        within_first = not pending.done
        if within_first:
            for segment, dy, grad in zip(segments, dys, grads, strict=True):
                for gradient in (grad.x_nQHP, grad.dt_nQH, grad.B_nGQN):
                    gradient.zero_()
                _within(segment, D, dy, grad)
        for segment, own, dstate, grad, dleaving in zip(segments, states, dstates, grads, pending.wait(), strict=True):
            chunks, decays = segment.chunks, segment.decays
            add_entering_state(chunks, decays, dstate, dleaving, reverse=True)
            for block in chunks.blocks():
                through_leaving_states(chunks, decays, own, dstate, block, grad, add=within_first)
        if not within_first:
            for segment, dy, grad in zip(segments, dys, grads, strict=True):
                _within(segment, D, dy, grad)
        return *_join(segments, grads, inputs), None, None, None, None


def _within(segment: Segment, D: Tensor | None, dy_nQHP: Tensor, grads: Gradients) -> None:
    """Add what a segment's tokens get from the outputs of their own chunks."""
    for block in segment.chunks.blocks():
        within_chunks(segment.chunks, segment.decays, D, dy_nQHP[block], block, grads)


def _to_entering_state(segment: Segment, states: Tensor, dy_nQHP: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
    """What a segment's outputs give to its chunks' states, and to the state that enters it `(B, H, P, N)`."""
    chunks, decays = segment.chunks, segment.decays
    dstates = torch.empty_like(states)
    for block in chunks.blocks():
        through_entering_states(chunks, decays, states, dstates, dy_nQHP[block], block, grads)
    carry = states_to_groups(None, states, chunks.num_rows)
    return dstates, states_from_groups(scan_in_place(dstates, decays.through_nH, carry, chunks.per_row, reverse=True))


def _join(segments: list[Segment], grads: list[Gradients], inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The gradients of `x, dt, A, B, C, D` from those of all segments."""
    x, dt, A_H, B, C, D, _, _ = inputs
    assert C is not None
    dA_H, parts = torch.zeros_like(A_H, dtype=torch.float64), []
    for segment, grad in zip(segments, grads, strict=True):
        ddt_nQH, dA = through_decays(segment.chunks, segment.decays, A_H, grad)
        dA_H += dA
        tokens = (grad.x_nQHP, ddt_nQH, grad.B_nGQN.transpose(1, 2), grad.C_nGQN.transpose(1, 2))
        likes = (value[:, segment.place] for value in (x, dt, B, C))
        parts.append([join_chunks(value, like) for value, like in zip(tokens, likes, strict=True)])
    dx, ddt, dB, dC = parts[0] if len(parts) == 1 else (torch.cat(part, 1) for part in zip(*parts, strict=True))
    dD = None
    if D is not None:
        dD_HP = torch.stack([grad.D_HP for grad in grads]).sum(0)
        dD = (dD_HP if D.dim() == 2 else dD_HP.sum(1)).to(D.dtype)
    return dx, ddt, dA_H.to(A_H.dtype), dB, dC, dD
