"""Walks through time: the scan itself, what segments do to states, and their composition."""

# In a kernel, Triton knows no unpacking of tuples.
# ruff: noqa: RUF005
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, launch
from ...tiles import tile
from ..layout import Inputs
from .plan import Plan, decay_rates, grid_of, inflows, steps_and_decays


def launch_forward(
    inputs: Inputs,
    plan: Plan,
    entering: Tensor | None,
    y: Tensor | None,
    kept: Tensor | None,
    final: Tensor,
    decay: Tensor | None,
) -> None:
    """Walk from the entering states of all segments to `y`, the kept states and the `final` one.

    With `decay`, to what each segment does to a state instead: its decay, and in `final` what it leaves from zero.
    """
    common = steps_and_decays(inputs, plan)
    if y is None:
        common["C_ptr"] = None
    launch(
        _selective_scan_forward_kernel,
        grid_of(inputs, plan),
        entering_ptr=entering,
        y_ptr=y,
        kept_ptr=kept,
        final_ptr=final,
        decay_ptr=decay,
        **common,
        **inflows(inputs),
    )


def launch_reverse(inputs: Inputs, plan: Plan, dy: Tensor | None, local: Tensor, decay: Tensor) -> None:
    """Find what each segment does to the gradient of the state leaving it: its decay, and what it adds, `local`."""
    launch(
        _selective_scan_reverse_kernel,
        grid_of(inputs, plan),
        dy_ptr=dy,
        local_ptr=local,
        decay_ptr=decay,
        **steps_and_decays(inputs, plan),
    )


def compose(local: Tensor, decay: Tensor, entering: Tensor | None, final: Tensor | None, *, reverse: bool) -> Tensor:
    """Turn what all segments do to a state into the states that arrive at them; `final` takes what the last leaves.

    `local` and `decay` are `(segments, B, I, N)`, a decay of -1 tells that nothing passes through. In reverse, states
    travel from the last segment to the first.
    """
    states = torch.empty_like(local)
    choice = tile("selective_scan_compose", architecture(local))
    size = local[0].numel()
    launch(
        _selective_scan_compose_kernel,
        (triton.cdiv(size, choice["block"]),),
        local_ptr=local,
        decay_ptr=decay,
        entering_ptr=entering,
        states_ptr=states,
        final_ptr=final,
        segments=local.shape[0],
        size=size,
        REVERSE=reverse,
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )
    return states


@triton.jit
def _selective_scan_forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    reset_ptr,
    entering_ptr,
    y_ptr,
    kept_ptr,
    final_ptr,
    decay_ptr,
    batch,
    L,
    width,
    N,
    span,
    x_stride_b,
    x_stride_t,
    dt_stride_b,
    dt_stride_t,
    A_stride_i,
    A_stride_n,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    reset_stride_b,
    reset_stride_t,
    CHUNK: tl.constexpr,
    STRIP: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_I)
    program = tl.program_id(0)
    i = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    row = (program // blocks).to(tl.int64)
    b = row % batch
    first_chunk = (row // batch).to(tl.int32) * span
    last_chunk = tl.minimum(first_chunk + span, tl.cdiv(L, CHUNK))
    n = tl.arange(0, BLOCK_N)
    in_width, in_state = i < width, (n < N)[:, None] & (i < width)[None, :]
    offset = i[None, :] * N + n[:, None]
    own = tl.arange(0, BLOCK_I)[None, :] * BLOCK_N + n[:, None]
    padded = tl.cdiv(width, PADDING) * (PADDING * BLOCK_N)
    A = decay_rates(A_ptr, i, n, width, N, A_stride_i, A_stride_n)
    state = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    if entering_ptr is not None:
        state = tl.load(entering_ptr + row * width * N + offset, mask=in_state, other=0.0).to(tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + i, mask=in_width, other=0.0).to(tl.float32)
    if decay_ptr is not None:
        total = tl.full((BLOCK_N, BLOCK_I), 1.0, tl.float32)
        cut = tl.full((), 0, tl.int32)

    for step in range(last_chunk - first_chunk):
        chunk = first_chunk + step
        if kept_ptr is not None:
            at = (chunk.to(tl.int64) * batch + b) * padded + program % blocks * (BLOCK_I * BLOCK_N)
            tl.store(kept_ptr + at + own, state)
        for strip in range(tl.cdiv(tl.minimum(L - chunk * CHUNK, CHUNK), STRIP)):
            first = chunk * CHUNK + strip * STRIP
            # All loads come before the first store, which none may pass.
            xs, dts, Bs, Cs, resets = (), (), (), (), ()
            for q in tl.static_range(STRIP):
                t = (first + q).to(tl.int64)
                here, n_here = tl.where(t < L, in_width, False), tl.where(t < L, n < N, False)
                x = tl.load(x_ptr + b * x_stride_b + t * x_stride_t + i, mask=here, other=0.0)
                dt = tl.load(dt_ptr + b * dt_stride_b + t * dt_stride_t + i, mask=here, other=0.0)
                B = tl.load(B_ptr + b * B_stride_b + t * B_stride_t + n, mask=n_here, other=0.0)
                xs, dts, Bs = xs + (x.to(tl.float32),), dts + (dt.to(tl.float32),), Bs + (B.to(tl.float32),)
                if C_ptr is not None:
                    C = tl.load(C_ptr + b * C_stride_b + t * C_stride_t + n, mask=n_here, other=0.0)
                    Cs = Cs + (C.to(tl.float32),)
                if reset_ptr is not None:
                    reset_ptr_t = reset_ptr + b * reset_stride_b + t * reset_stride_t
                    resets = resets + (tl.load(reset_ptr_t, mask=t < L, other=0) != 0,)
            for q in tl.static_range(STRIP):
                t = (first + q).to(tl.int64)
                decay = tl.exp2(dts[q][None, :] * A)
                decayed = decay * state
                if reset_ptr is not None:
                    decayed = tl.where(resets[q], 0.0, decayed)
                state = decayed + (dts[q] * xs[q])[None, :] * Bs[q][:, None]
                if decay_ptr is not None:
                    total *= decay
                    if reset_ptr is not None:
                        cut = tl.where(resets[q], 1, cut)
                if y_ptr is not None:
                    y = tl.sum(state * Cs[q][:, None], 0)
                    if D_ptr is not None:
                        y += D * xs[q]
                    tl.store(y_ptr + (b * L + t) * width + i, y, mask=tl.where(t < L, in_width, False))

    if decay_ptr is not None:
        # -1 tells that a document starts in the segment: nothing passes through it.
        tl.store(decay_ptr + row * width * N + offset, tl.where(cut != 0, -1.0, total), mask=in_state)
        tl.store(final_ptr + row * width * N + offset, state, mask=in_state)
    else:
        if last_chunk * CHUNK >= L:
            tl.store(final_ptr + b * width * N + offset, state, mask=in_state)


@triton.jit
def _selective_scan_reverse_kernel(
    dt_ptr,
    A_ptr,
    C_ptr,
    reset_ptr,
    dy_ptr,
    local_ptr,
    decay_ptr,
    batch,
    L,
    width,
    N,
    span,
    dt_stride_b,
    dt_stride_t,
    A_stride_i,
    A_stride_n,
    C_stride_b,
    C_stride_t,
    reset_stride_b,
    reset_stride_t,
    CHUNK: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_I)
    program = tl.program_id(0)
    i = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    row = (program // blocks).to(tl.int64)
    b = row % batch
    begin = (row // batch).to(tl.int32) * span * CHUNK
    strips = tl.cdiv(tl.minimum(L - begin, span * CHUNK), STRIP)
    n = tl.arange(0, BLOCK_N)
    in_width, in_state = i < width, (n < N)[:, None] & (i < width)[None, :]
    offset = i[None, :] * N + n[:, None]
    A = decay_rates(A_ptr, i, n, width, N, A_stride_i, A_stride_n)
    carry = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    total = tl.full((BLOCK_N, BLOCK_I), 1.0, tl.float32)
    cut = tl.full((), 0, tl.int32)

    for back in range(strips):
        for q in tl.static_range(STRIP - 1, -1, -1):
            t = (begin + (strips - 1 - back) * STRIP + q).to(tl.int64)
            here, n_here = tl.where(t < L, in_width, False), tl.where(t < L, n < N, False)
            dt = tl.load(dt_ptr + b * dt_stride_b + t * dt_stride_t + i, mask=here, other=0.0).to(tl.float32)
            if dy_ptr is not None:
                dy = tl.load(dy_ptr + (b * L + t) * width + i, mask=here, other=0.0).to(tl.float32)
                C = tl.load(C_ptr + b * C_stride_b + t * C_stride_t + n, mask=n_here, other=0.0).to(tl.float32)
                carry += dy[None, :] * C[:, None]
            decay = tl.exp2(dt[None, :] * A)
            carry *= decay
            total *= decay
            if reset_ptr is not None:
                reset = tl.load(reset_ptr + b * reset_stride_b + t * reset_stride_t, mask=t < L, other=0) != 0
                carry = tl.where(reset, 0.0, carry)
                cut = tl.where(reset, 1, cut)

    tl.store(decay_ptr + row * width * N + offset, tl.where(cut != 0, -1.0, total), mask=in_state)
    tl.store(local_ptr + row * width * N + offset, carry, mask=in_state)


@triton.jit
def _selective_scan_compose_kernel(
    local_ptr,
    decay_ptr,
    entering_ptr,
    states_ptr,
    final_ptr,
    segments,
    size,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    state = tl.zeros((BLOCK,), tl.float32)
    if entering_ptr is not None:
        state = tl.load(entering_ptr + i, mask=inside, other=0.0).to(tl.float32)
    at = i
    if REVERSE:
        at += tl.full((), segments - 1, tl.int64) * size
    for _ in range(segments):
        tl.store(states_ptr + at, state, mask=inside)
        decay = tl.load(decay_ptr + at, mask=inside, other=0.0)
        local = tl.load(local_ptr + at, mask=inside, other=0.0)
        state = tl.where(decay < 0, local, decay * state + local)
        at = at - size if REVERSE else at + size
    if final_ptr is not None:
        tl.store(final_ptr + i, state, mask=inside)
