"""The state passed from chunk to chunk, without outputs: summaries, states computed again, and gradients of states.

Forward, keys are B and values x: `S = through S + sum_j (dt_j out_j value_j) key_j^T`. In reverse, keys are C and
values dy: `dS = through dS + sum_q (into_q value_q) key_q^T`, from the last chunk to the first. States are float32
while they are carried.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .decays import FusedDecays, into_decay, out_weight, through_decay
from .plan import Plan, row_and_token


def pass_states(
    values_BLHP: Tensor,
    keys_BLGN: Tensor,
    decays: FusedDecays,
    plan: Plan,
    entering: Tensor | None,
    *,
    reverse: bool,
    keep: bool,
    segments: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pass the state through each of `segments` stretches of chunks, in one launch.

    `entering` is `(B, segments, H, P, N)` float32, None for zeros. Returns the total decays `(B, segments, H)`, the
    states that leave, like `entering`, and, with `keep`, those that enter each span `(B, spans, H, P, N)`.
    """
    B, H = decays.dt.shape[:2]
    kept = plan.empty_states(values_BLHP) if keep else None
    total = decays.dt.new_empty(B, segments, H)
    leaving = decays.dt.new_empty(B, segments, H, plan.P, plan.N)
    launch(
        _ssd_states_kernel,
        (H * plan.blocks_p, B, segments),
        values_ptr=values_BLHP,
        keys_ptr=keys_BLGN,
        **decays.pointers(),
        entering_ptr=entering,
        total_ptr=total,
        leaving_ptr=leaving,
        kept_ptr=kept,
        **row_and_token("values", values_BLHP),
        **row_and_token("keys", keys_BLGN),
        length=values_BLHP.shape[1],
        segment_chunks=plan.segment_chunks(segments),
        H=H,
        heads_per_group=H // plan.G,
        REVERSE=reverse,
        BLOCK_N=plan.block_n,
        **plan.constants(),
        **plan.options("states"),
    )
    return total, leaving, kept


def compose_segments(total: Tensor, leaving: Tensor, initial: Tensor | None, *, reverse: bool) -> Tensor:
    """States that enter each segment, `(B, segments, H, P, N)`, from all segments' summaries and the first's state.

    With `reverse`, from the last segment to the first. One launch.
    """
    B, segments, H, P, N = leaving.shape
    entering = torch.empty_like(leaving)
    block = min(1024, triton.next_power_of_2(N * P))
    launch(
        _ssd_compose_kernel,
        (triton.cdiv(N * P, block), H, B),
        total_ptr=total,
        leaving_ptr=leaving,
        initial_ptr=initial,
        entering_ptr=entering,
        segments=segments,
        H=H,
        size=N * P,
        REVERSE=reverse,
        BLOCK=block,
    )
    return entering


@triton.jit
def _ssd_states_kernel(
    values_ptr,
    keys_ptr,
    log_ptr,
    log_low_ptr,
    from_ptr,
    from_low_ptr,
    start_ptr,
    entering_ptr,
    total_ptr,
    leaving_ptr,
    kept_ptr,
    values_row,
    values_token: tl.constexpr,
    keys_row,
    keys_token: tl.constexpr,
    length,
    chunks,
    segment_chunks,
    H: tl.constexpr,
    heads_per_group: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads are neighbours in the grid: those of a group read its keys at about the same time, from cache.
    h, first_p = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK_P
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), first_p + tl.arange(0, BLOCK_P)
    in_state = (p[:, None] < P) & (n[None, :] < N)
    place = p[:, None] * N + n[None, :]
    values_ptr += row * values_row + h * P
    keys_ptr += row * keys_row + h // heads_per_group * N
    of_head = (row * H + h) * chunks * Q
    of_segment = (row * tl.num_programs(2) + segment) * H + h
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if entering_ptr is not None:
        state = tl.load(entering_ptr + of_segment * P * N + place, mask=in_state, other=0.0)
    total = 1.0
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for step in range(0, last - first):
        c = first + step
        if REVERSE:
            c = last - 1 - step
        start = c.to(tl.int64) * Q
        at, start_at = of_head + start, row * chunks * Q + start
        if kept_ptr is not None:
            # Stored by mask and not by branch, so that the loop stays one that can be pipelined.
            columns = tl.where(c % SPAN == 0, N, 0)
            if REVERSE:
                columns = tl.where((c % SPAN == SPAN - 1) | (c == chunks - 1), N, 0)
            in_kept = in_state & (n[None, :] < columns)
            spans = (chunks + SPAN - 1) // SPAN
            kept = ((row * spans + c // SPAN) * H + h) * P * N
            tl.store(kept_ptr + kept + place, state.to(kept_ptr.dtype.element_ty), mask=in_kept)
        in_chunk = (q < length - start)[:, None]
        values_at = values_ptr + start * values_token + (q[:, None] * values_token + p[None, :])
        values = tl.load(values_at, mask=in_chunk & (p[None, :] < P), other=0.0)
        keys_at = keys_ptr + start * keys_token + (q[:, None] * keys_token + n[None, :])
        keys = tl.load(keys_at, mask=in_chunk & (n[None, :] < N), other=0.0)
        if REVERSE:
            weight = into_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        else:
            weight = out_weight(log_ptr, log_low_ptr, from_ptr, from_low_ptr, start_ptr, at, start_at, Q)
        through = through_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        weighted = (values.to(tl.float32) * weight[:, None]).to(keys.dtype)
        state = tl.dot(tl.trans(weighted), keys, state * through, input_precision=PRECISION)
        total *= through
    tl.store(leaving_ptr + of_segment * P * N + place, state, mask=in_state)
    if first_p == 0:
        tl.store(total_ptr + of_segment, total)


@triton.jit
def _ssd_compose_kernel(
    total_ptr, leaving_ptr, initial_ptr, entering_ptr, segments, H, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + (row * H + h) * size + i, mask=i < size, other=0.0)
    for step in range(0, segments):
        s = step
        if REVERSE:
            s = segments - 1 - step
        at = (row * segments + s) * H + h
        tl.store(entering_ptr + at * size + i, state, mask=i < size)
        own = tl.load(leaving_ptr + at * size + i, mask=i < size, other=0.0)
        state = tl.load(total_ptr + at) * state + own
