"""Decays of all chunks, computed once: what the other kernels read instead of step sizes and resets, heads first.

Within a chunk, an input at token j reaches token q >= j with weight `dt_j exp(sum of dt A over j < t <= q)`, which is
`2^(log_q - from_j)`: `log` sums the logarithms of decays from the chunk's beginning, and `from_j = log_j - log2(dt_j)`.
Sums are float64. float32 inputs also keep what rounding took away (`low`), so that their weights are as good as
multiplied step by step. Sums start anew at each document; `start` tells where in the chunk a token's document begins.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
# A decay of 2^-1024 is zero in every dtype: larger steps would only cost later tokens digits.
SMALLEST_LOG2 = tl.constexpr(-1024.0)
# `from` of a token whose step size is zero: its weight is zero, and differences stay finite.
FROM_NOTHING = tl.constexpr(4096.0)


class FusedDecays(NamedTuple):
    """Decays padded to whole chunks by tokens with a step size of zero, `(B, H, C * Q)` float32 each.

    `log_low` and `from_low` are what `log` and `from_` lack, None where inputs are not float32. `start` is
    `(B, C * Q)` int32: the last reset in the chunk up to a token, -1 for none; None where nothing is reset.
    """

    dt: Tensor
    log: Tensor
    log_low: Tensor | None
    from_: Tensor
    from_low: Tensor | None
    start: Tensor | None

    def pointers(self) -> dict[str, Any]:
        """Kernel arguments."""
        return {
            "log_ptr": self.log,
            "log_low_ptr": self.log_low,
            "from_ptr": self.from_,
            "from_low_ptr": self.from_low,
            "start_ptr": self.start,
        }


def empty_decays(dt_BLH: Tensor, reset: Tensor | None, chunk: int, exact: bool) -> FusedDecays:
    """Room for the decays of chunks of `chunk` tokens."""
    B, L, H = dt_BLH.shape
    padded = triton.cdiv(L, chunk) * chunk
    dt, log, from_ = (dt_BLH.new_empty(B, H, padded, dtype=torch.float32) for _ in range(3))
    log_low, from_low = (torch.empty_like(log) if exact else None for _ in range(2))
    start = None if reset is None else dt_BLH.new_empty(B, padded, dtype=torch.int32)
    return FusedDecays(dt, log, log_low, from_, from_low, start)


def compute_fused_decays(dt_BLH: Tensor, A_H: Tensor, reset: Tensor | None, chunk: int, exact: bool) -> FusedDecays:
    """Compute the decays of chunks of `chunk` tokens in one launch; with `exact`, the low parts too."""
    B, L, H = dt_BLH.shape
    decays = empty_decays(dt_BLH, reset, chunk, exact)
    block = min(16, triton.next_power_of_2(H))
    launch(
        _ssd_decays_kernel,
        (triton.cdiv(L, chunk), B, triton.cdiv(H, block)),
        dt_in_ptr=dt_BLH,
        A_ptr=A_H.contiguous(),
        reset_ptr=None if reset is None else reset.contiguous(),
        dt_ptr=decays.dt,
        **decays.pointers(),
        dt_row=dt_BLH.stride(0),
        dt_token=dt_BLH.stride(1),
        length=L,
        H=H,
        Q=chunk,
        BLOCK_H=block,
        num_warps=4,
    )
    return decays


@triton.jit
def add_within_document(sum_1, starts_1, sum_2, starts_2):
    """Joins two stretches of a sum that starts anew wherever `starts` is set."""
    return tl.where(starts_2 != 0, sum_2, sum_1 + sum_2), starts_1 | starts_2


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ssd_decays_kernel(
    dt_in_ptr,
    A_ptr,
    reset_ptr,
    dt_ptr,
    log_ptr,
    log_low_ptr,
    from_ptr,
    from_low_ptr,
    start_ptr,
    dt_row,
    dt_token,
    length,
    H,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    q = tl.arange(0, Q)
    t = tl.program_id(0).to(tl.int64) * Q + q
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    padded = tl.num_programs(0).to(tl.int64) * Q
    inside = (t[:, None] < length) & (h[None, :] < H)
    places = dt_in_ptr + row * dt_row + t[:, None] * dt_token + h[None, :]
    dt = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float64)
    log = dt.to(tl.float64) * (A * LOG2_E)[None, :]
    log = tl.where(log < SMALLEST_LOG2, SMALLEST_LOG2, log)
    starts = tl.zeros((Q, BLOCK_H), tl.int32)
    if reset_ptr is not None:
        reset = tl.load(reset_ptr + row * length + t, mask=t < length, other=0).to(tl.int32)
        starts += reset[:, None]
        if tl.program_id(2) == 0:
            start = tl.associative_scan(tl.where(reset != 0, q, -1), 0, _later)
            tl.store(start_ptr + row * padded + t, start)
    log, _ = tl.associative_scan((log, starts), 0, add_within_document)
    from_ = tl.where(dt == 0, FROM_NOTHING, log - tl.log2(tl.where(dt == 0, 1.0, dt).to(tl.float64)))
    high, from_high = log.to(tl.float32), from_.to(tl.float32)
    out = (row * H + h[None, :]) * padded + t[:, None]
    tl.store(dt_ptr + out, dt, mask=h[None, :] < H)
    tl.store(log_ptr + out, high, mask=h[None, :] < H)
    tl.store(from_ptr + out, from_high, mask=h[None, :] < H)
    if log_low_ptr is not None:
        tl.store(log_low_ptr + out, (log - high.to(tl.float64)).to(tl.float32), mask=h[None, :] < H)
        tl.store(from_low_ptr + out, (from_ - from_high.to(tl.float64)).to(tl.float32), mask=h[None, :] < H)


@triton.jit
def _weight(log, from_, log_low, from_low):
    """`2^(log - from)`, with what rounding the difference loses put back."""
    difference = log - from_
    part = difference - log
    lost = (log - (difference - part)) - (from_ + part)
    return tl.exp2(difference) * (1.0 + LOG_2 * (lost + log_low - from_low))


@triton.jit
def into_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q: tl.constexpr):
    """Decay from the state entering a chunk to each of its tokens; `at` and `start_at` are where the chunk begins."""
    q = tl.arange(0, Q)
    decay = tl.exp2(tl.load(log_ptr + at + q))
    if log_low_ptr is not None:
        decay *= tl.exp2(tl.load(log_low_ptr + at + q))
    if start_ptr is not None:
        decay = tl.where(tl.load(start_ptr + start_at + q) < 0, decay, 0.0)
    return decay


@triton.jit
def out_weight(log_ptr, log_low_ptr, from_ptr, from_low_ptr, start_ptr, at, start_at, Q: tl.constexpr):
    """Step size times decay from each token of a chunk to the state leaving it."""
    q = tl.arange(0, Q)
    log, from_ = tl.load(log_ptr + at + Q - 1), tl.load(from_ptr + at + q)
    if log_low_ptr is None:
        weight = tl.exp2(log - from_)
    else:
        weight = _weight(log, from_, tl.load(log_low_ptr + at + Q - 1), tl.load(from_low_ptr + at + q))
    if start_ptr is not None:
        weight = tl.where(q >= tl.load(start_ptr + start_at + Q - 1), weight, 0.0)
    return weight


@triton.jit
def through_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q: tl.constexpr):
    """Decay from the state entering a chunk to the state leaving it, one number."""
    decay = tl.exp2(tl.load(log_ptr + at + Q - 1))
    if log_low_ptr is not None:
        decay *= tl.exp2(tl.load(log_low_ptr + at + Q - 1))
    if start_ptr is not None:
        decay = tl.where(tl.load(start_ptr + start_at + Q - 1) < 0, decay, 0.0)
    return decay


@triton.jit
def sees(start_ptr, start_at, turn, Q: tl.constexpr):
    """Which token of a chunk (row) sees which (column): those of its document up to itself.

    `turn` is any number that changes with each turn of the loop around: without it the compiler would compute the mask
    once and hold it in registers, one a token pair.
    """
    q = turn + tl.arange(0, Q)
    visible = q[:, None] >= q[None, :]
    if start_ptr is not None:
        first = turn + tl.load(start_ptr + start_at + tl.arange(0, Q))
        visible = visible & (q[None, :] >= first[:, None])
    return visible


@triton.jit
def weight_between(log_ptr, log_low_ptr, from_ptr, from_low_ptr, at, visible, Q: tl.constexpr):
    """Step size of the column times decay to the row, exact zeros where the row does not see the column."""
    q = tl.arange(0, Q)
    log, from_ = tl.load(log_ptr + at + q)[:, None], tl.load(from_ptr + at + q)[None, :]
    if log_low_ptr is None:
        weight = tl.exp2(log - from_)
    else:
        low, from_low = tl.load(log_low_ptr + at + q), tl.load(from_low_ptr + at + q)
        weight = _weight(log, from_, low[:, None], from_low[None, :])
    return tl.where(visible, weight, 0.0)
