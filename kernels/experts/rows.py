"""Moving rows between tokens and experts in PyTorch: every result is gathered, none is added to by several.

Letters: `T` tokens, `k` copies of a token, `S` rows ordered by expert, `X` experts. Nothing waits for a GPU. Indices
are checked on a CPU, where a look at them costs next to nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import blocks, compute_dtype


def order_copies(experts_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the row of every copy, `(T, k)` int64, and the end of every expert's rows, `(X,)` int32."""
    nowhere_Tk = (experts_Tk < 0) | (experts_Tk >= num_experts)
    if experts_Tk.device.type == "cpu" and experts_Tk[nowhere_Tk].ne(-1).any():
        wrong = experts_Tk[nowhere_Tk & (experts_Tk != -1)][0]
        raise IndexError(f"experts hold {wrong}; give 0 to {num_experts - 1}, or -1 for no copy")
    key_N = experts_Tk.masked_fill(nowhere_Tk, num_experts).to(key_dtype(num_experts)).flatten()
    sorted_N, order_N = torch.sort(key_N, stable=True)
    numbers_X = torch.arange(num_experts, dtype=sorted_N.dtype, device=sorted_N.device)
    ends_X = torch.searchsorted(sorted_N, numbers_X, right=True, out_int32=True)
    row_N = torch.arange(len(key_N), device=key_N.device).masked_fill_(sorted_N == num_experts, -1)
    return torch.empty_like(row_N).scatter_(0, order_N, row_N).view(experts_Tk.shape), ends_X


def key_dtype(num_experts: int) -> torch.dtype:
    """The narrowest dtype of sorting keys: radix sorts go over them byte by byte."""
    return torch.int16 if num_experts < 1 << 15 else torch.int32


def spread_rows(x_TD: Tensor, weight_Tk: Tensor | None, place_Tk: Tensor, num_rows: int) -> Tensor:
    """Return `(num_rows, D)`: row `place[t, j]` is `x[t]`, times `weight[t, j]` if there are weights; others are 0."""
    _check_places(place_Tk, num_rows)
    copies = place_Tk.shape[1]
    out_SD = x_TD.new_empty(num_rows, x_TD.shape[1])
    if place_Tk.numel() == 0:
        return out_SD.zero_()
    copy_S = _copy_of_rows(place_Tk, num_rows)
    empty_S1, copy_S = (copy_S < 0)[:, None], copy_S.clamp(min=0)
    token_S = copy_S // copies
    some_empty = out_SD.device.type != "cpu" or bool(empty_S1.any())
    for block in _row_blocks(out_SD):
        out = out_SD[block]
        if weight_Tk is None:
            torch.index_select(x_TD, 0, token_S[block], out=out)
        else:
            weight_S1 = weight_Tk.flatten()[copy_S[block], None]
            out.copy_(x_TD.index_select(0, token_S[block]).to(weight_Tk.dtype).mul_(weight_S1))
        if some_empty:
            out.masked_fill_(empty_S1[block], 0.0)
    return out_SD


def combine_rows(y_SD: Tensor, weight_Tk: Tensor | None, place_Tk: Tensor) -> Tensor:
    """Return `(T, D)`: the sum of the rows `place[t]` of `y` in order of j, each times its weight if there are any."""
    _check_places(place_Tk, len(y_SD))
    (T, copies), dtype = place_Tk.shape, compute_dtype(y_SD)
    out_TD = y_SD.new_zeros(T, y_SD.shape[1])
    if len(y_SD) == 0:
        return out_TD
    for block in _row_blocks(out_TD):
        total = out_TD[block] if dtype == y_SD.dtype else torch.zeros_like(out_TD[block], dtype=dtype)
        for j in range(copies):
            rows = _take_rows(y_SD, place_Tk[block, j], dtype)
            if weight_Tk is None:
                total += rows
            else:
                total.addcmul_(rows, weight_Tk[block, j, None])
        if total.dtype != out_TD.dtype:
            out_TD[block] = total
    return out_TD


def products_of_rows(dout_TD: Tensor, y_SD: Tensor, place_Tk: Tensor) -> Tensor:
    """Return `(T, k)` in float32 (float64): the inner product of `dout[t]` and row `place[t, j]` of `y`, 0 for none."""
    dtype = compute_dtype(y_SD)
    product_Tk = torch.zeros(place_Tk.shape, dtype=dtype, device=y_SD.device)
    if len(y_SD) == 0:
        return product_Tk
    for block in _row_blocks(dout_TD):
        dout = dout_TD[block].to(dtype)
        for j in range(place_Tk.shape[1]):
            rows = y_SD.index_select(0, place_Tk[block, j].clamp(min=0)).to(dtype)
            torch.sum(rows.mul_(dout), 1, out=product_Tk[block, j])
    return product_Tk.masked_fill_(place_Tk < 0, 0.0)


def _take_rows(y_SD: Tensor, place_T: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the rows `place` in `dtype`, zeros for -1."""
    rows_TD = y_SD.index_select(0, place_T.clamp(min=0)).to(dtype)
    dropped_T = place_T < 0
    if rows_TD.device.type == "cpu" and not dropped_T.any():
        return rows_TD
    return rows_TD.masked_fill_(dropped_T[:, None], 0.0)


def _copy_of_rows(place_Tk: Tensor, num_rows: int) -> Tensor:
    """The inverse of `place`: which copy, `t * k + j`, row s is, or -1. What has no row goes to one that is cut off."""
    copy_S1 = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=place_Tk.device)
    number_N = torch.arange(place_Tk.numel(), device=place_Tk.device)
    return copy_S1.scatter_(0, place_Tk.masked_fill(place_Tk < 0, num_rows).flatten(), number_N)[:num_rows]


def _row_blocks(rows: Tensor) -> Iterator[slice]:
    """Blocks that stay within a core's cache; all rows at once on a GPU, where each block would be a launch."""
    return blocks(*rows.shape) if rows.device.type == "cpu" else iter((slice(0, len(rows)),))


def _check_places(place_Tk: Tensor, num_rows: int) -> None:
    if place_Tk.device.type != "cpu" or place_Tk.numel() == 0:
        return
    low, high = (int(value) for value in place_Tk.aminmax())
    if low < -1 or high >= num_rows:
        raise IndexError(f"place holds {low if low < -1 else high}; give 0 to {num_rows - 1}, or -1 for no copy")
