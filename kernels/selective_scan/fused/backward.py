"""Gradients: one walk backwards through time, and sums over blocks of channels and over chunks.

A program walks its chunks from the last to the first. It runs each forward again from the kept state, noting the state
that enters each strip of a few tokens; then it goes back strip by strip, with the decays and the decayed states of one
strip in registers. Nothing is divided by a decay. What channels give to B and C, and chunks to A and D, is written
apart and added up in a fixed order.
"""

# In a kernel, Triton knows no unpacking of tuples.
# ruff: noqa: RUF005
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, launch
from ...tiles import tile
from .. import layout
from ..layout import Inputs, padded_state
from .plan import Plan, decay_rates, grid_of, inflows, steps_and_decays


def launch_backward(
    inputs: Inputs, plan: Plan, dy: Tensor | None, leaving: Tensor | None, kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `x, dt, A, B, C, D, initial_state`, those of C and D None where the inputs are.

    `leaving` are the gradients of the states leaving all segments, None for zero; `dy` is contiguous or None.
    """
    x, dt, A, B, C, D, initial_state, _ = inputs
    batch, L, width = x.shape
    padded_width, padded_n = padded_state(A)
    block_i = plan.choice["block_i"]
    (programs,) = grid_of(inputs, plan)

    def empty(*shape: int, like: Tensor = kept) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=x.device)

    dx, ddt = empty(batch, L, width, like=x), empty(batch, L, width, like=dt)
    dinitial = empty(batch, padded_width, padded_n)
    of_projections = empty(batch, triton.cdiv(width, block_i), (1 if C is None else 2) * L * padded_n)
    of_channels = empty(1, kept.shape[0] * batch, padded_width * (padded_n if D is None else padded_n + 1))
    launch(
        _selective_scan_backward_kernel,
        (programs,),
        dy_ptr=dy,
        leaving_ptr=leaving,
        kept_ptr=kept,
        scratch_ptr=empty(programs, layout.FUSED_CHUNK // plan.choice["strip"], block_i, padded_n),
        dx_ptr=dx,
        ddt_ptr=ddt,
        of_projections_ptr=of_projections,
        of_channels_ptr=of_channels,
        dinitial_ptr=dinitial,
        **steps_and_decays(inputs, plan),
        **inflows(inputs),
    )
    dB, dC = empty(*B.shape, like=B), None if C is None else empty(*C.shape, like=C)
    _sum_parts(of_projections, dB, dC, padded_n, padded_n)
    dA, dD = empty(*A.shape, like=A), None if D is None else empty(width, like=D)
    _sum_parts(of_channels, dA[None], None if dD is None else dD[None], padded_n, padded_width)
    dinitial = dinitial[:, :width, : A.shape[1]].to(kept.dtype if initial_state is None else initial_state.dtype)
    return dx, ddt, dA, dB, dC, dD, dinitial.contiguous()


def _sum_parts(parts: Tensor, first: Tensor, second: Tensor | None, padded_first: int, padded_second: int) -> None:
    """Add up `(rows, parts, columns)` over the parts, in their order.

    The columns are those of `first[row]` and then those of `second[row]`, the last dimension of each padded.
    """
    rows, number, columns = parts.shape
    choice = tile("selective_scan_sum", architecture(parts))
    split = columns
    if second is not None:
        split -= second[0].numel() // second.shape[-1] * padded_second
    launch(
        _selective_scan_sum_kernel,
        (triton.cdiv(columns, choice["block"]), rows),
        parts_ptr=parts,
        first_ptr=first,
        second_ptr=second,
        parts=number,
        columns=columns,
        split=split,
        size_first=first[0].numel(),
        size_second=0 if second is None else second[0].numel(),
        width_first=first.shape[-1],
        width_second=0 if second is None else second.shape[-1],
        padded_first=padded_first,
        padded_second=padded_second,
        BLOCK_P=choice["block_p"],
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )


@triton.jit
def _selective_scan_backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    reset_ptr,
    dy_ptr,
    leaving_ptr,
    kept_ptr,
    scratch_ptr,
    dx_ptr,
    ddt_ptr,
    of_projections_ptr,
    of_channels_ptr,
    dinitial_ptr,
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
    block = program % blocks
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    row = (program // blocks).to(tl.int64)
    b = row % batch
    first_chunk = (row // batch).to(tl.int32) * span
    chunks = tl.minimum(span, tl.cdiv(L, CHUNK) - first_chunk)
    n = tl.arange(0, BLOCK_N)
    in_width, in_state = i < width, (n < N)[:, None] & (i < width)[None, :]
    offset = i[None, :] * N + n[:, None]
    A = decay_rates(A_ptr, i, n, width, N, A_stride_i, A_stride_n)
    if D_ptr is not None:
        D = tl.load(D_ptr + i, mask=in_width, other=0.0).to(tl.float32)
    carry = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    if leaving_ptr is not None:
        carry = tl.load(leaving_ptr + row * width * N + offset, mask=in_state, other=0.0).to(tl.float32)
    padded = tl.cdiv(width, PADDING) * PADDING
    kinds = 1 if C_ptr is None else 2
    of_projections_ptr += (b * blocks + block) * kinds * L * BLOCK_N
    scratch_ptr += program.to(tl.int64) * (CHUNK // STRIP * BLOCK_N * BLOCK_I)
    own = tl.arange(0, BLOCK_I)[None, :] * BLOCK_N + n[:, None]

    for back in range(chunks):
        chunk = first_chunk + chunks - 1 - back
        part = chunk.to(tl.int64) * batch + b
        at = (part * padded + block * BLOCK_I) * BLOCK_N
        strips = tl.cdiv(tl.minimum(L - chunk * CHUNK, CHUNK), STRIP)
        state = tl.load(kept_ptr + at + own)
        tl.store(scratch_ptr + own, state)
        for strip in range(strips - 1):
            xs, dts, Bs, resets = (), (), (), ()
            for q in tl.static_range(STRIP):
                t = (chunk * CHUNK + strip * STRIP + q).to(tl.int64)
                x_q = tl.load(x_ptr + b * x_stride_b + t * x_stride_t + i, mask=in_width, other=0.0)
                dt_q = tl.load(dt_ptr + b * dt_stride_b + t * dt_stride_t + i, mask=in_width, other=0.0)
                B_q = tl.load(B_ptr + b * B_stride_b + t * B_stride_t + n, mask=n < N, other=0.0)
                xs, dts, Bs = xs + (x_q.to(tl.float32),), dts + (dt_q.to(tl.float32),), Bs + (B_q.to(tl.float32),)
                if reset_ptr is not None:
                    resets = resets + (tl.load(reset_ptr + b * reset_stride_b + t * reset_stride_t) != 0,)
            for q in tl.static_range(STRIP):
                decayed = tl.exp2(dts[q][None, :] * A) * state
                if reset_ptr is not None:
                    decayed = tl.where(resets[q], 0.0, decayed)
                state = decayed + (dts[q] * xs[q])[None, :] * Bs[q][:, None]
            tl.store(scratch_ptr + (strip + 1) * (BLOCK_N * BLOCK_I) + own, state)
        tl.debug_barrier()  # what is read below may have been written by another thread

        dA = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        dD = tl.zeros((BLOCK_I,), tl.float32)
        for strip_back in range(strips):
            strip = strips - 1 - strip_back
            first = chunk * CHUNK + strip * STRIP
            state = tl.load(scratch_ptr + strip * (BLOCK_N * BLOCK_I) + own)
            xs, dts, Bs, resets, decays, kepts = (), (), (), (), (), ()
            for q in tl.static_range(STRIP):
                t = (first + q).to(tl.int64)
                here, n_here = tl.where(t < L, in_width, False), tl.where(t < L, n < N, False)
                x_q = tl.load(x_ptr + b * x_stride_b + t * x_stride_t + i, mask=here, other=0.0)
                dt_q = tl.load(dt_ptr + b * dt_stride_b + t * dt_stride_t + i, mask=here, other=0.0)
                B_q = tl.load(B_ptr + b * B_stride_b + t * B_stride_t + n, mask=n_here, other=0.0)
                xs, dts, Bs = xs + (x_q.to(tl.float32),), dts + (dt_q.to(tl.float32),), Bs + (B_q.to(tl.float32),)
                if reset_ptr is not None:
                    reset_ptr_t = reset_ptr + b * reset_stride_b + t * reset_stride_t
                    resets = resets + (tl.load(reset_ptr_t, mask=t < L, other=0) != 0,)
            for q in tl.static_range(STRIP):
                decay = tl.exp2(dts[q][None, :] * A)
                decayed = decay * state
                if reset_ptr is not None:
                    decayed = tl.where(resets[q], 0.0, decayed)
                state = decayed + (dts[q] * xs[q])[None, :] * Bs[q][:, None]
                decays, kepts = decays + (decay,), kepts + (decayed,)
            for q in tl.static_range(STRIP - 1, -1, -1):
                t = (first + q).to(tl.int64)
                if t < L:
                    # Loaded again: kept from above, these would leave no registers for decays and states.
                    x = tl.load(x_ptr + b * x_stride_b + t * x_stride_t + i, mask=in_width, other=0.0).to(tl.float32)
                    dt = tl.load(dt_ptr + b * dt_stride_b + t * dt_stride_t + i, mask=in_width, other=0.0)
                    dt = dt.to(tl.float32)
                    B = tl.load(B_ptr + b * B_stride_b + t * B_stride_t + n, mask=n < N, other=0.0).to(tl.float32)
                    dstate, dtx = carry, dt * x
                    if dy_ptr is not None:
                        dy = tl.load(dy_ptr + (b * L + t) * width + i, mask=in_width, other=0.0).to(tl.float32)
                        C = tl.load(C_ptr + b * C_stride_b + t * C_stride_t + n, mask=n < N, other=0.0).to(tl.float32)
                        dstate += dy[None, :] * C[:, None]
                        # The state is what was kept and dtx B: their shares are summed apart.
                        dC = tl.sum(dy[None, :] * kepts[q], 1) + B * tl.sum(dy * dtx, 0)
                        tl.store(of_projections_ptr + (t + L) * BLOCK_N + n, dC, mask=n < N)
                    tl.store(of_projections_ptr + t * BLOCK_N + n, tl.sum(dtx[None, :] * dstate, 1), mask=n < N)
                    ddtx = tl.sum(dstate * B[:, None], 0)
                    flow = dstate * kepts[q]  # of the logarithm of the decay
                    dA += flow * dt[None, :]
                    ddt = ddtx * x + 0.6931471805599453 * tl.sum(flow * A, 0)
                    carry = decays[q] * dstate
                    if reset_ptr is not None:
                        carry = tl.where(resets[q], 0.0, carry)
                    dx = ddtx * dt
                    if dy_ptr is not None:
                        dD += dy * x
                        if D_ptr is not None:
                            dx += D * dy
                    tl.store(dx_ptr + (b * L + t) * width + i, dx, mask=in_width)
                    tl.store(ddt_ptr + (b * L + t) * width + i, ddt, mask=in_width)
        tl.debug_barrier()  # the next chunk's states may be written by threads ahead of those that read
        part_ptr = of_channels_ptr + part * padded * (BLOCK_N if D_ptr is None else BLOCK_N + 1)
        tl.store(part_ptr + block * (BLOCK_I * BLOCK_N) + own, dA)
        if D_ptr is not None:
            tl.store(part_ptr + padded * BLOCK_N + i, dD)

    if first_chunk == 0:
        tl.store(dinitial_ptr + (b * padded + block * BLOCK_I) * BLOCK_N + own, carry)


@triton.jit
def _selective_scan_sum_kernel(
    parts_ptr,
    first_ptr,
    second_ptr,
    parts,
    columns,
    split,
    size_first,
    size_second,
    width_first,
    width_second,
    padded_first,
    padded_second,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    sums = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    parts_ptr += row * parts * columns
    for begin in range(0, parts, BLOCK_P):
        here = (part < parts - begin)[:, None] & (column < columns)[None, :]
        at = (begin + part).to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(parts_ptr + at, mask=here, other=0.0)
    total = tl.sum(sums, 0)
    within = column % padded_first
    at = column // padded_first * width_first + within
    tl.store(
        first_ptr + row * size_first + at, total, mask=(column < split) & (within < width_first) & (at < size_first)
    )
    if second_ptr is not None:
        column -= split
        within = column % padded_second
        at = column // padded_second * width_second + within
        there = (column >= 0) & (within < width_second) & (at < size_second)
        tl.store(second_ptr + row * size_second + at, total, mask=there)
