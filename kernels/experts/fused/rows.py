"""Rows between tokens and experts on a GPU.

Letters as in `../rows.py`. Every kernel takes some tokens with all their copies: a token is read once, or written once,
whatever the number of its rows. Rows that no token writes are cleared by programs of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, launch
from ...tiles import tile
from ..rows import key_dtype

# Rows of a token that are under way together when they are added up; more would not fit into registers.
COPIES_AT_ONCE = 8


def order_copies(experts_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the row of every copy, `(T, k)` int64, and the end of every expert's rows, `(X,)` int32."""
    copies = experts_Tk.numel()
    block = tile("expert_order", architecture(experts_Tk))["block"]
    key_N = torch.empty(copies, dtype=key_dtype(num_experts), device=experts_Tk.device)
    launch(
        _expert_keys_kernel,
        (triton.cdiv(copies, block),),
        key_ptr=key_N,
        experts_ptr=experts_Tk.contiguous(),
        copies=copies,
        num_experts=num_experts,
        BLOCK=block,
    )
    sorted_N, order_N = torch.sort(key_N, stable=True)
    place_Tk = torch.empty(experts_Tk.shape, dtype=torch.int64, device=experts_Tk.device)
    ends_X = torch.empty(num_experts, dtype=torch.int32, device=experts_Tk.device)
    launch(
        _expert_places_kernel,
        (triton.cdiv(max(copies, num_experts), block),),
        place_ptr=place_Tk,
        ends_ptr=ends_X,
        sorted_ptr=sorted_N,
        order_ptr=order_N,
        copies=copies,
        num_experts=num_experts,
        halvings=copies.bit_length(),
        BLOCK=block,
    )
    return place_Tk, ends_X


def spread_rows(x_TD: Tensor, place_Tk: Tensor, num_rows: int) -> Tensor:
    """Return `(num_rows, D)`: row `place[t, j]` is `x[t]`, others are 0; arguments contiguous."""
    (T, D), copies = x_TD.shape, place_Tk.shape[1]
    out_SD = x_TD.new_empty(num_rows, D)
    _clear_rows_of_nobody(out_SD, place_Tk)
    rows, block, num_warps = _tile_of_rows(x_TD)
    launch(
        _expert_permute_kernel,
        (triton.cdiv(T, rows) * triton.cdiv(D, block),),
        out_ptr=out_SD,
        x_ptr=x_TD,
        place_ptr=place_Tk,
        T=T,
        S=num_rows,
        D=D,
        COPIES=copies,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out_SD


def combine_rows(y_SD: Tensor, weight_Tk: Tensor | None, place_Tk: Tensor) -> Tensor:
    """Return `(T, D)`: the sum of a token's rows of `y` in order of j, each times its weight if there are any."""
    (S, D), (T, copies) = y_SD.shape, place_Tk.shape
    out_TD = y_SD.new_empty(T, D)
    rows, block, num_warps = _tile_of_rows(y_SD)
    launch(
        _expert_combine_kernel,
        (triton.cdiv(T, rows) * triton.cdiv(D, block),),
        out_ptr=out_TD,
        y_ptr=y_SD,
        weight_ptr=weight_Tk,
        place_ptr=place_Tk,
        T=T,
        S=S,
        D=D,
        COPIES=copies,
        AT_ONCE=max(1, min(copies, COPIES_AT_ONCE)),
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out_TD


def unpermute_backward(dout_TD: Tensor, y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the weights of `unpermute`; arguments contiguous."""
    (S, D), (T, copies) = y_SD.shape, place_Tk.shape
    dy_SD, dweight_Tk = torch.empty_like(y_SD), torch.empty_like(weight_Tk)
    _clear_rows_of_nobody(dy_SD, place_Tk)
    rows, block, num_warps = _tile_of_rows(y_SD)
    launch(
        _expert_unpermute_backward_kernel,
        (triton.cdiv(T, rows),),
        dy_ptr=dy_SD,
        dweight_ptr=dweight_Tk,
        dout_ptr=dout_TD,
        y_ptr=y_SD,
        weight_ptr=weight_Tk,
        place_ptr=place_Tk,
        T=T,
        S=S,
        D=D,
        COPIES=copies,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return dy_SD, dweight_Tk


def _clear_rows_of_nobody(out_SD: Tensor, place_Tk: Tensor) -> None:
    """Write zeros to the rows that no copy names: which they are, only the device knows."""
    S, D = out_SD.shape
    arch = architecture(out_SD)
    named_S = torch.zeros(S, dtype=torch.int8, device=out_SD.device)
    block = tile("expert_order", arch)["block"]
    launch(
        _expert_named_kernel,
        (triton.cdiv(place_Tk.numel(), block),),
        named_ptr=named_S,
        place_ptr=place_Tk,
        copies=place_Tk.numel(),
        S=S,
        BLOCK=block,
    )
    choice = tile("expert_clear", arch)
    launch(
        _expert_clear_kernel,
        (triton.cdiv(S, choice["rows"]) if D else 0,),
        out_ptr=out_SD,
        named_ptr=named_S,
        S=S,
        D=D,
        ROWS=choice["rows"],
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )


def _tile_of_rows(rows: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    choice = tile("expert_rows", architecture(rows))
    block = min(triton.next_power_of_2(max(rows.shape[1], 1)), choice["block"])
    return max(1, choice["elements"] // block), block, choice["num_warps"]


@triton.jit
def _expert_keys_kernel(key_ptr, experts_ptr, copies, num_experts, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + i, mask=i < copies, other=0)
    there = (expert >= 0) & (expert < num_experts)
    tl.store(key_ptr + i, tl.where(there, expert, num_experts), mask=i < copies)


@triton.jit
def _expert_places_kernel(
    place_ptr,
    ends_ptr,
    sorted_ptr,
    order_ptr,
    copies,
    num_experts,
    halvings,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(sorted_ptr + i, mask=i < copies, other=0)
    copy = tl.load(order_ptr + i, mask=i < copies, other=0)
    tl.store(place_ptr + copy, tl.where(key < num_experts, i, -1), mask=i < copies)
    if tl.program_id(0) * BLOCK < num_experts:
        low = tl.zeros((BLOCK,), tl.int32)
        high = low + copies
        for _ in range(halvings):
            middle = low + (high - low) // 2
            below = tl.load(sorted_ptr + middle, mask=low < high, other=0) <= i
            low, high = tl.where((low < high) & below, middle + 1, low), tl.where(below, high, middle)
        tl.store(ends_ptr + i, low, mask=i < num_experts)


@triton.jit
def _expert_named_kernel(named_ptr, place_ptr, copies, S, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(place_ptr + i, mask=i < copies, other=-1)
    tl.store(named_ptr + place, tl.full((BLOCK,), 1, tl.int8), mask=(place >= 0) & (place < S))


@triton.jit
def _expert_clear_kernel(out_ptr, named_ptr, S, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    empty = tl.load(named_ptr + row, mask=row < S, other=1) == 0
    # Most programs have nothing to do.
    if tl.max(empty.to(tl.int32), 0) > 0:
        zeros = tl.zeros((ROWS, BLOCK), out_ptr.dtype.element_ty)
        for start in range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = row[:, None] * D + column[None, :]
            tl.store(out_ptr + at, zeros, mask=empty[:, None] & (column < D)[None, :])


@triton.jit
def _places_of_copy(place_ptr, token, j, T, S, COPIES: tl.constexpr):
    # The rows of copy j, and whether there are such.
    copy = tl.zeros_like(token) + j
    place = tl.load(place_ptr + token * COPIES + copy, mask=(token < T) & (copy < COPIES), other=-1)
    return place, (place >= 0) & (place < S)


@triton.jit
def _expert_permute_kernel(
    out_ptr,
    x_ptr,
    place_ptr,
    T,
    S,
    D,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (token < T)[:, None] & (column < D)
    x = tl.load(x_ptr + token[:, None] * D + column, mask=inside, other=0.0)
    for j in tl.static_range(COPIES):
        place, there = _places_of_copy(place_ptr, token, j, T, S, COPIES)
        tl.store(out_ptr + place[:, None] * D + column, x, mask=there[:, None] & (column < D))


@triton.jit
def _expert_combine_kernel(
    out_ptr,
    y_ptr,
    weight_ptr,
    place_ptr,
    T,
    S,
    D,
    COPIES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, COPIES, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            j = first + i
            place, there = _places_of_copy(place_ptr, token, j, T, S, COPIES)
            inside = there[:, None] & (column < D)
            y = tl.load(y_ptr + place[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                y *= tl.load(weight_ptr + token * COPIES + j, mask=there, other=0.0)[:, None]
            total += y
    tl.store(out_ptr + token[:, None] * D + column, total, mask=(token < T)[:, None] & (column < D))


@triton.jit
def _expert_unpermute_backward_kernel(
    dy_ptr,
    dweight_ptr,
    dout_ptr,
    y_ptr,
    weight_ptr,
    place_ptr,
    T,
    S,
    D,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for j in tl.static_range(COPIES):
        place, there = _places_of_copy(place_ptr, token, j, T, S, COPIES)
        weight = tl.load(weight_ptr + token * COPIES + j, mask=there, other=0.0)[:, None]
        product = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, D, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            inside = there[:, None] & (column < D)
            at = place[:, None] * D + column
            # From the second copy on, caches hold it.
            dout = tl.load(dout_ptr + token[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
            product += dout * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dy_ptr + at, dout * weight, mask=inside)
        tl.store(dweight_ptr + token * COPIES + j, tl.sum(product, 1), mask=token < T)
