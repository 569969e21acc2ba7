"""The embedding's backward on a GPU: tokens are sorted, then every row of the gradient is written once, by one program.

Letters: `T` tokens, `V` rows, `D` columns, `C` chunks. Sorted, equal tokens are neighbours: a run. A run may be as long
as all tokens, so positions are cut into chunks, and chunks that lie within one run are summed beforehand, side by side.
A row's program then adds two parts of chunks and the sums of the chunks between, always in the order of the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch, num_processors
from ..tiles import tile


def embedding_backward(dy_TD: Tensor, tokens_T: Tensor, rows: int) -> Tensor:
    """Return the gradient `(rows, D)` of the table for that of its output, `dy`, contiguous."""
    T, D = dy_TD.shape
    choice = tile("embedding_backward", architecture(dy_TD))
    # Half the bits to sort by; there are far fewer rows.
    sorted_T, order_T = torch.sort(tokens_T.to(torch.int32), stable=True)
    start_V1 = torch.empty(rows + 1, dtype=torch.int32, device=dy_TD.device)
    launch(
        _run_starts_kernel,
        (triton.cdiv(rows + 1, choice["block_v"]),),
        start_ptr=start_V1,
        sorted_ptr=sorted_T,
        T=T,
        V1=rows + 1,
        halvings=T.bit_length(),
        BLOCK=choice["block_v"],
    )
    blocks, chunk = triton.cdiv(D, choice["block_d"]), choice["chunk"]
    sum_CD = torch.empty(T // chunk, D, dtype=torch.float32, device=dy_TD.device)
    launch(
        _chunk_sums_kernel,
        (T // chunk * blocks,),
        sum_ptr=sum_CD,
        dy_ptr=dy_TD,
        sorted_ptr=sorted_T,
        order_ptr=order_T,
        D=D,
        CHUNK=chunk,
        TOKENS=choice["tokens"],
        BLOCK=choice["block_d"],
        num_warps=choice["num_warps"],
    )
    # Most rows of a large table have no token; of a small one each has many.
    rows_at_once = choice["rows"] if rows * blocks >= 64 * num_processors(dy_TD) else 1
    dweight_VD = dy_TD.new_empty(rows, D)
    launch(
        _row_sums_kernel,
        (triton.cdiv(rows, rows_at_once) * blocks,),
        dweight_ptr=dweight_VD,
        dy_ptr=dy_TD,
        sum_ptr=sum_CD,
        order_ptr=order_T,
        start_ptr=start_V1,
        V=rows,
        D=D,
        CHUNK=chunk,
        ROWS=rows_at_once,
        TOKENS=choice["tokens"],
        BLOCK=choice["block_d"],
        num_warps=choice["num_warps"],
    )
    return dweight_VD


@triton.jit
def _run_starts_kernel(start_ptr, sorted_ptr, T, V1, halvings, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + T
    for _ in range(halvings):
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle, mask=low < high, other=0) < row
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where(below, high, middle)
    tl.store(start_ptr + row, low, mask=row < V1)


@triton.jit
def _sum_tokens(dy_ptr, order_ptr, first, end, column, D, TOKENS: tl.constexpr):
    position = first + tl.arange(0, TOKENS)
    token = tl.load(order_ptr + position, mask=position < end, other=0).to(tl.int64)
    inside = (position < end)[:, None] & (column < D)[None, :]
    return tl.sum(tl.load(dy_ptr + token[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32), 0)


@triton.jit
def _chunk_sums_kernel(
    sum_ptr,
    dy_ptr,
    sorted_ptr,
    order_ptr,
    D,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    chunk = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = chunk * CHUNK
    if tl.load(sorted_ptr + first) == tl.load(sorted_ptr + first + CHUNK - 1):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(first, first + CHUNK, TOKENS):
            total += _sum_tokens(dy_ptr, order_ptr, start, first + CHUNK, column, D, TOKENS)
        tl.store(sum_ptr + chunk.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def _row_sums_kernel(
    dweight_ptr,
    dy_ptr,
    sum_ptr,
    order_ptr,
    start_ptr,
    V,
    D,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    first_row = tl.program_id(0) // blocks * ROWS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    dweight_rows = dweight_ptr + first_row.to(tl.int64) * D
    for row in range(first_row, tl.minimum(first_row + ROWS, V)):
        start, end = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
        first_chunk, end_chunk = tl.cdiv(start, CHUNK), end // CHUNK
        whole = first_chunk < end_chunk
        head_end = tl.where(whole, first_chunk * CHUNK, end)
        tail_start = tl.where(whole, end_chunk * CHUNK, end)
        total = tl.zeros((BLOCK,), tl.float32)
        for position in range(start, head_end, TOKENS):
            total += _sum_tokens(dy_ptr, order_ptr, position, head_end, column, D, TOKENS)
        for chunk in range(first_chunk, end_chunk, TOKENS):
            summed = chunk + tl.arange(0, TOKENS)
            inside = (summed < end_chunk)[:, None] & (column < D)[None, :]
            at = summed.to(tl.int64)[:, None] * D + column[None, :]
            total += tl.sum(tl.load(sum_ptr + at, mask=inside, other=0.0), 0)
        for position in range(tail_start, end, TOKENS):
            total += _sum_tokens(dy_ptr, order_ptr, position, end, column, D, TOKENS)
        tl.store(dweight_rows + (row - first_row) * D + column, total, mask=column < D)
