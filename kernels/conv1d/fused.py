"""The causal depthwise convolution on a GPU: one pass over memory forward, one backward.

A program walks its channels through time. The last K inputs, and backward the unfinished gradients of the last K tokens
and the program's share of the parameters' gradients, stay in registers: no token is loaded or computed twice, but for
the K - 1 where one walk ends and the next begins. Counting tokens since the last reset tells which taps a token has.
"""

# Kernels build tuples in unrolled loops, by addition: (*a, b) is not known there.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch, num_processors
from ..tiles import Tile, tile


def conv1d_forward(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return `y_BLD` and the final state; arguments as in `causal_conv1d`, channels contiguous."""
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    y_BLD = torch.empty((B, L, D), dtype=x_BLD.dtype, device=x_BLD.device)
    final = torch.empty((B, K - 1, D), dtype=x_BLD.dtype, device=x_BLD.device)
    choice = tile("conv1d_forward", architecture(x_BLD), "k4" if K <= 4 else "k8")
    channel_blocks = triton.cdiv(D, choice["block_d"])
    rows = _rows_of_program(choice, B * channel_blocks, L, num_processors(x_BLD))
    launch(
        _conv1d_forward_kernel,
        (B * triton.cdiv(L, rows) * channel_blocks,),
        y_ptr=y_BLD,
        final_ptr=final,
        rows=rows,
        SILU=silu,
        CHUNK=choice["chunk"],
        BLOCK_D=choice["block_d"],
        num_warps=choice["num_warps"],
        **_inputs(x_BLD, weight_DK, bias_D, initial_state, reset),
    )
    return y_BLD, final


def conv1d_backward(
    dy_BLD: Tensor | None,
    dfinal: Tensor | None,
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `x, weight, bias, initial_state` for contiguous gradients of the results, or None."""
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    choice = tile("conv1d_backward", architecture(x_BLD), "k4" if K <= 4 else "k8")
    channel_blocks = triton.cdiv(D, choice["block_d"])
    rows = _rows_of_program(choice, B * channel_blocks, L, num_processors(x_BLD))
    time_blocks = triton.cdiv(L, rows)
    dx_BLD = torch.empty((B, L, D), dtype=x_BLD.dtype, device=x_BLD.device)
    like = x_BLD if initial_state is None else initial_state
    dinitial = torch.empty((B, K - 1, D), dtype=like.dtype, device=like.device)
    partial = torch.empty((B * time_blocks, K + 1, D), dtype=torch.float32, device=x_BLD.device)
    launch(
        _conv1d_backward_kernel,
        (B * time_blocks * channel_blocks,),
        dy_ptr=dy_BLD,
        dfinal_ptr=dfinal,
        dx_ptr=dx_BLD,
        dinitial_ptr=dinitial,
        partial_ptr=partial,
        rows=rows,
        SILU=silu,
        CHUNK=choice["chunk"],
        BLOCK_D=choice["block_d"],
        num_warps=choice["num_warps"],
        **_inputs(x_BLD, weight_DK, bias_D, initial_state, reset),
    )
    return dx_BLD, *_reduce(partial, weight_DK, bias_D), dinitial


def _inputs(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    return {
        "x_ptr": x_BLD,
        "weight_ptr": weight_DK.contiguous(),
        "bias_ptr": None if bias_D is None else bias_D.contiguous(),
        "initial_ptr": initial_state,
        "reset_ptr": reset,
        "L": x_BLD.shape[1],
        "D": x_BLD.shape[2],
        "x_stride_b": x_BLD.stride(0),
        "x_stride_t": x_BLD.stride(1),
        "initial_stride_b": 0 if initial_state is None else initial_state.stride(0),
        "initial_stride_t": 0 if initial_state is None else initial_state.stride(1),
        "reset_stride_b": 0 if reset is None else reset.stride(0),
        "reset_stride_t": 0 if reset is None else reset.stride(1),
        "K": weight_DK.shape[1],
    }


def _rows_of_program(choice: Tile, columns: int, L: int, processors: int) -> int:
    """Tokens a program walks through, so that about `programs` of them are there for each processor.

    Few long walks keep the buffer of partial sums small, whatever L is; short sequences are cut finely enough to keep
    the processors busy. Depends on sizes and the device alone: the same call gives the same bits.
    """
    wanted = triton.cdiv(columns * L, choice["programs"] * processors)
    return triton.cdiv(max(wanted, choice["rows"]), choice["chunk"]) * choice["chunk"]


def _reduce(partial: Tensor, weight_DK: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the programs' shares up, in their order, to the gradients of weight and bias."""
    D, K = weight_DK.shape
    dweight_DK = torch.empty((D, K), dtype=weight_DK.dtype, device=partial.device)
    dbias_D = torch.empty((D,), dtype=(weight_DK if bias_D is None else bias_D).dtype, device=partial.device)
    choice = tile("conv1d_reduce", architecture(partial))
    launch(
        _conv1d_reduce_kernel,
        (triton.cdiv(D, choice["block_d"]), K + 1),
        partial_ptr=partial,
        dweight_ptr=dweight_DK,
        dbias_ptr=dbias_D,
        parts=partial.shape[0],
        D=D,
        K=K,
        BLOCK_P=choice["block_p"],
        BLOCK_D=choice["block_d"],
        num_warps=choice["num_warps"],
    )
    return dweight_DK, dbias_D


@triton.jit
def _conv1d_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    reset_ptr,
    y_ptr,
    final_ptr,
    L,
    D,
    rows,
    x_stride_b,
    x_stride_t,
    initial_stride_b,
    initial_stride_t,
    reset_stride_b,
    reset_stride_t,
    K: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channel_blocks, time_blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(L, rows)
    program = tl.program_id(0)
    d = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = program // channel_blocks
    b = (part // time_blocks).to(tl.int64)
    begin = part % time_blocks * rows
    left = L - begin  # time counts from the program's first token on
    in_width = d < D
    x_stride_t = tl.cast(x_stride_t, tl.int64)
    x_ptr += b * x_stride_b + begin * x_stride_t + d
    y_ptr += (b * L + begin) * D + d
    final_ptr += b * (K - 1) * D + d
    if initial_ptr is not None:
        initial_ptr += b * initial_stride_b + d
    if reset_ptr is not None:
        reset_ptr += b * reset_stride_b + begin.to(tl.int64) * reset_stride_t
    weight, bias = _load_weights(weight_ptr, bias_ptr, d, in_width, K)
    window = _load_window(x_ptr, initial_ptr, begin, x_stride_t, initial_stride_t, in_width, K)
    since = _count_since_reset(reset_ptr, begin, reset_stride_t, K)

    for first in range(0, tl.minimum(rows, left), CHUNK):
        # All loads come before the first store, which none may pass.
        row = tl.cast(first, tl.int64)
        xs, resets = (), ()
        for i in tl.static_range(CHUNK):
            t = first + i
            there = tl.where(t < left, in_width, False)
            xs = xs + (tl.load(x_ptr + (row + i) * x_stride_t, mask=there, other=0.0).to(tl.float32),)
            if reset_ptr is not None:
                resets = resets + (tl.load(reset_ptr + (row + i) * reset_stride_t, mask=t < left, other=0) != 0,)
        for i in tl.static_range(CHUNK):
            if reset_ptr is not None:
                since = tl.where(resets[i], 0, since + 1)
            window = (xs[i],) + window[: K - 1]
            y = bias + weight[0] * xs[i]
            for shift in tl.static_range(1, K):
                seen = window[shift] if reset_ptr is None else tl.where(shift <= since, window[shift], 0.0)
                y += weight[shift] * seen
            if SILU:
                y *= tl.sigmoid(y)
            tl.store(y_ptr + (row + i) * D, y, mask=tl.where(first + i < left, in_width, False))

    if left <= rows:
        last = _load_window(
            x_ptr + left * x_stride_t, initial_ptr, begin + left, x_stride_t, initial_stride_t, in_width, K
        )
        # The last chunk counted past the end.
        since -= tl.cdiv(left, CHUNK) * CHUNK - left
        for back in tl.static_range(K - 1):
            x = last[back] if reset_ptr is None else tl.where(back <= since, last[back], 0.0)
            tl.store(final_ptr + (K - 2 - back) * D, x, mask=in_width)


@triton.jit
def _load_weights(weight_ptr, bias_ptr, d, in_width, K: tl.constexpr):
    """The taps by their shift, the token's own first, and the bias, zero where there is none."""
    weight = ()
    for shift in tl.static_range(K):
        tap = tl.load(weight_ptr + d * K + K - 1 - shift, mask=in_width, other=0.0)
        weight = weight + (tap.to(tl.float32),)
    bias = tl.zeros_like(weight[0])
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=in_width, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _load_window(x_ptr, initial_ptr, begin, x_stride_t, initial_stride_t, in_width, K: tl.constexpr):
    """The K inputs before token `begin`, the latest first; from the initial state where there is no token."""
    window = ()
    for shift in tl.static_range(1, K + 1):
        t = begin - shift
        x = tl.load(x_ptr - shift * x_stride_t, mask=tl.where(t >= 0, in_width, False), other=0.0)
        if shift < K and initial_ptr is not None:
            initial_ptr_t = initial_ptr + (t + K - 1).to(tl.int64) * initial_stride_t
            halo = tl.load(initial_ptr_t, mask=tl.where(t < 0, in_width, False), other=0.0)
            x = tl.where(t < 0, halo.to(x.dtype), x)
        window = window + (x.to(tl.float32),)
    return window


@triton.jit
def _count_since_reset(reset_ptr, begin, reset_stride_t, K: tl.constexpr):
    """Tokens from the last reset to token `begin - 1`; K - 1 or more where no tap reaches back to it."""
    since = tl.full((), K, tl.int32)
    if reset_ptr is not None:
        for back in tl.static_range(K - 1, 0, -1):
            reset = tl.load(reset_ptr - back * reset_stride_t, mask=begin >= back, other=0)
            since = tl.where(reset != 0, 0, since + 1)
    return since


@triton.jit
def _conv1d_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    reset_ptr,
    dy_ptr,
    dfinal_ptr,
    dx_ptr,
    dinitial_ptr,
    partial_ptr,
    L,
    D,
    rows,
    x_stride_b,
    x_stride_t,
    initial_stride_b,
    initial_stride_t,
    reset_stride_b,
    reset_stride_t,
    K: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channel_blocks, time_blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(L, rows)
    program = tl.program_id(0)
    d = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = program // channel_blocks
    b = (part // time_blocks).to(tl.int64)
    begin = part % time_blocks * rows
    left = L - begin  # time counts from the program's first token on
    own = tl.minimum(rows, left)
    in_width = d < D
    zero = tl.zeros((BLOCK_D,), tl.float32)
    x_stride_t = tl.cast(x_stride_t, tl.int64)
    x_ptr += b * x_stride_b + begin * x_stride_t + d
    dx_ptr += (b * L + begin) * D + d
    dinitial_ptr += b * (K - 1) * D + d
    if dy_ptr is not None:
        dy_ptr += (b * L + begin) * D + d
    if dfinal_ptr is not None:
        dfinal_ptr += b * (K - 1) * D + d
    if reset_ptr is not None:
        reset_ptr += b * reset_stride_b + begin.to(tl.int64) * reset_stride_t
    if initial_ptr is not None:
        initial_ptr += b * initial_stride_b + d
    weight, bias = _load_weights(weight_ptr, bias_ptr, d, in_width, K)
    window = _load_window(x_ptr, initial_ptr, begin, x_stride_t, initial_stride_t, in_width, K)
    since = _count_since_reset(reset_ptr, begin, reset_stride_t, K)
    # `pending` holds the unfinished dx of the last K tokens.
    pending, dweight = (), ()
    for _ in tl.static_range(K):
        pending, dweight = pending + (zero,), dweight + (zero,)
    dbias = zero
    halo_rows = tl.where(begin == 0, K - 1, 0)

    whole = own // CHUNK * CHUNK
    for past_end in tl.static_range(2):
        # dx_t waits for the dy of K - 1 more tokens: the walk goes on past the program's own, and past the sequence's.
        for first in range(whole * past_end, own + K - 1 if past_end else whole, CHUNK):
            # All loads come before the first store, which none may pass.
            row = tl.cast(first, tl.int64)
            xs, dys, resets = (), (), ()
            for i in tl.static_range(CHUNK):
                t = first + i
                there = tl.where(t < left, in_width, False) if past_end else in_width
                xs = xs + (tl.load(x_ptr + (row + i) * x_stride_t, mask=there, other=0.0).to(tl.float32),)
                if dy_ptr is not None:
                    dys = dys + (tl.load(dy_ptr + (row + i) * D, mask=there, other=0.0).to(tl.float32),)
                if reset_ptr is not None:
                    resets = resets + (tl.load(reset_ptr + (row + i) * reset_stride_t, mask=t < left, other=0) != 0,)
            for i in tl.static_range(CHUNK):
                t = first + i
                if reset_ptr is not None:
                    since = tl.where(resets[i], 0, since + 1)
                # Larger shifts reach into another document; a token past the end sees and gives nothing.
                reach = tl.where(t < left, since, 0) if past_end else since
                window = (xs[i],) + window[: K - 1]
                seen = window
                if past_end or reset_ptr is not None:
                    seen = (xs[i],)
                    for shift in tl.static_range(1, K):
                        seen = seen + (tl.where(shift <= reach, window[shift], 0.0),)
                before, pending = pending, (zero,) + pending[: K - 1]
                if dy_ptr is not None:
                    dpre = dys[i]
                    if SILU:
                        pre = bias
                        for shift in tl.static_range(K):
                            pre += weight[shift] * seen[shift]
                        sigmoid = tl.sigmoid(pre)
                        dpre *= sigmoid * (1 + pre * (1 - sigmoid))
                    pending = (weight[0] * dpre,)
                    for shift in tl.static_range(1, K):
                        grown = before[shift - 1] + weight[shift] * dpre
                        if past_end or reset_ptr is not None:
                            grown = tl.where(shift <= reach, grown, before[shift - 1])
                        pending = pending + (grown,)
                    sums, dweight = dweight, ()
                    for shift in tl.static_range(K):
                        grown = sums[shift] + dpre * seen[shift]
                        dweight = dweight + (tl.where(t < own, grown, sums[shift]) if past_end else grown,)
                    dbias = tl.where(t < own, dbias + dpre, dbias) if past_end else dbias + dpre
                dx = pending[K - 1]
                if past_end and dfinal_ptr is not None:
                    # The final state's row K - 1 tokens back reads as one more tap of a token past the end.
                    returned = tl.where((t >= left) & (t < left + K - 1), in_width, False)
                    dfinal = tl.load(dfinal_ptr + (row + i - left) * D, mask=returned, other=0.0)
                    dx += tl.where(since >= K - 1, dfinal.to(tl.float32), 0.0)
                done = (t >= K - 1) & (t < own + K - 1) if past_end else t >= K - 1
                tl.store(dx_ptr + (row + i - (K - 1)) * D, dx, mask=tl.where(done, in_width, False))
                tl.store(dinitial_ptr + (row + i) * D, dx, mask=tl.where(t < halo_rows, in_width, False))

    partial_ptr += part.to(tl.int64) * (K + 1) * D + d
    for shift in tl.static_range(K):
        tl.store(partial_ptr + (K - 1 - shift) * D, dweight[shift], mask=in_width)
    tl.store(partial_ptr + K * D, dbias, mask=in_width)


@triton.jit
def _conv1d_reduce_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, parts, D, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = tl.program_id(1)
    in_width = d < D
    part = tl.arange(0, BLOCK_P)
    partial_ptr += part.to(tl.int64)[:, None] * (K + 1) * D + tap * D + d[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, parts, BLOCK_P):
        there = (part < parts - first)[:, None] & in_width[None, :]
        sums += tl.load(partial_ptr, mask=there, other=0.0)
        partial_ptr += (BLOCK_P * (K + 1)) * D
    total = tl.sum(sums, 0)
    tl.store(dweight_ptr + d * K + tap, total, mask=tl.where(tap < K, in_width, False))
    tl.store(dbias_ptr + d, total, mask=tl.where(tap == K, in_width, False))
