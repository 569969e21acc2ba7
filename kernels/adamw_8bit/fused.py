"""8-bit AdamW on a GPU: one pass that reads and writes everything once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch
from ..tiles import tile
from .code_books import code_book
from .grid import BlockGrid
from .update import Moments, Rounding, Update

ONE_PASS, MAXIMA, WITH_MAXIMA = 0, 1, 2


def fused_update(
    p_RC: Tensor,
    grad_RC: Tensor,
    moments: Moments,
    update: Update,
    grid: BlockGrid,
    maxima: Tensor | None,
    rounding: Rounding | None,
) -> None:
    """`adamw_8bit_`, but for writing `maxima` to the scales."""
    phase = ONE_PASS if maxima is None else WITH_MAXIMA
    _launch(phase, p_RC, grad_RC, moments, update, grid, maxima, rounding)


def fused_maxima(grad_RC: Tensor, moments: Moments, update: Update, grid: BlockGrid, found: Tensor) -> None:
    """`block_maxima`, written into `found`."""
    _launch(MAXIMA, None, grad_RC, moments, update, grid, found, None)


def _launch(
    phase: int,
    p_RC: Tensor | None,
    grad_RC: Tensor,
    moments: Moments,
    update: Update,
    grid: BlockGrid,
    maxima: Tensor | None,
    rounding: Rounding | None,
) -> None:
    book1, book2 = code_book(True, grad_RC.device), code_book(False, grad_RC.device)
    choice = tile("adamw_8bit", architecture(grad_RC))
    wide = triton.next_power_of_2(min(grid.block_size, grid.columns))
    per = max(1, choice["elements"] // wide)
    number = update.step.double()
    numbers = torch.stack(
        [update.lr / (1.0 - update.beta1**number), (1.0 - update.beta2**number).sqrt(), update.skip.double(), number]
    ).float()
    launch(
        _adamw_8bit_kernel,
        (triton.cdiv(len(grad_RC) * grid.num_blocks, per),),
        p_ptr=p_RC,
        grad_ptr=grad_RC,
        codes1_ptr=moments.codes1,
        scales1_ptr=moments.scales1,
        codes2_ptr=moments.codes2,
        scales2_ptr=moments.scales2,
        maxima1_ptr=None if maxima is None else maxima[0],
        maxima2_ptr=None if maxima is None else maxima[1],
        values1_ptr=book1.values,
        thresholds1_ptr=book1.thresholds,
        cells1_ptr=book1.cells,
        values2_ptr=book2.values,
        thresholds2_ptr=book2.thresholds,
        cells2_ptr=book2.cells,
        row_ptr=None if rounding is None else rounding.row_R,
        numbers_ptr=numbers,
        beta1=update.beta1,
        rest1=1.0 - update.beta1,
        beta2=update.beta2,
        rest2=1.0 - update.beta2,
        eps=update.eps,
        decay=1.0 - update.lr * update.weight_decay,
        seed=0 if rounding is None else rounding.seed,
        rows=len(grad_RC),
        columns=grid.columns,
        first=grid.first,
        offset=grid.offset,
        num_blocks=grid.num_blocks,
        scale_columns=moments.scales1.shape[1],
        scale_column=grid.scale_column,
        BLOCK=grid.block_size,
        WIDE=wide,
        PER=per,
        PHASE=phase,
        ROUND=rounding is not None,
        num_warps=choice["num_warps"],
    )


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _nearest(x, cells_ptr, thresholds_ptr):
    cell = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    code = tl.load(cells_ptr + cell)
    return code + (x > tl.load(thresholds_ptr + code)).to(tl.int32)


@triton.jit
def _inverse(scale):
    least = 1.1754943508222875e-38  # normal float32
    return tl.where(scale < least, 0.0, 1.0 / tl.maximum(scale, least))


@triton.jit
def _adamw_8bit_kernel(
    p_ptr,
    grad_ptr,
    codes1_ptr,
    scales1_ptr,
    codes2_ptr,
    scales2_ptr,
    maxima1_ptr,
    maxima2_ptr,
    values1_ptr,
    thresholds1_ptr,
    cells1_ptr,
    values2_ptr,
    thresholds2_ptr,
    cells2_ptr,
    row_ptr,
    numbers_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    seed,
    rows,
    columns,
    first,
    offset,
    num_blocks,
    scale_columns,
    scale_column,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PER: tl.constexpr,
    PHASE: tl.constexpr,
    ROUND: tl.constexpr,
):
    one = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    row, block = one // num_blocks, one % num_blocks
    in_rows = row < rows
    # Where a row's first block begins on the rank before, its own columns stand at the block's end.
    start = tl.where(block == 0, offset, 0) if BLOCK > WIDE else block * 0
    within = start[:, None] + tl.arange(0, WIDE)[None, :]
    column = (block * BLOCK - offset)[:, None] + within
    inside = in_rows[:, None] & (column >= 0) & (column < columns) & (within < BLOCK)
    at = row[:, None] * columns + column
    scale_at = row * scale_columns + scale_column + block
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    code1 = tl.load(codes1_ptr + at, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(codes2_ptr + at, mask=inside, other=0).to(tl.int32)
    scale1 = tl.load(scales1_ptr + scale_at, mask=in_rows, other=0.0)
    scale2 = tl.load(scales2_ptr + scale_at, mask=in_rows, other=0.0)
    moment1 = tl.load(values1_ptr + code1) * scale1[:, None] * beta1 + rest1 * grad
    moment2 = tl.load(values2_ptr + code2) * scale2[:, None] * beta2 + rest2 * grad * grad
    moment1 = tl.where(inside, moment1, 0.0)
    moment2 = tl.where(inside, moment2, 0.0)
    if PHASE == 2:
        new1 = tl.load(maxima1_ptr + scale_at, mask=in_rows, other=0.0)
        new2 = tl.load(maxima2_ptr + scale_at, mask=in_rows, other=0.0)
    else:
        new1 = tl.max(tl.abs(moment1), 1)
        new2 = tl.max(moment2, 1)
    if PHASE == 1:
        tl.store(maxima1_ptr + scale_at, new1, mask=in_rows)
        tl.store(maxima2_ptr + scale_at, new2, mask=in_rows)
    else:
        in_rows = in_rows & (tl.load(numbers_ptr + 2 + block * 0) == 0.0)  # else the update is skipped
        inside = inside & in_rows[:, None]
        if PHASE == 0:
            tl.store(scales1_ptr + scale_at, new1, mask=in_rows)
            tl.store(scales2_ptr + scale_at, new2, mask=in_rows)
        nearest1 = _nearest(moment1 * _inverse(new1)[:, None], cells1_ptr, thresholds1_ptr)
        nearest2 = _nearest(moment2 * _inverse(new2)[:, None], cells2_ptr, thresholds2_ptr)
        tl.store(codes1_ptr + at, nearest1.to(tl.uint8), mask=inside)
        tl.store(codes2_ptr + at, nearest2.to(tl.uint8), mask=inside)
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        step_size, root = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
        p = p * decay - step_size * moment1 / (tl.sqrt(moment2) / root + eps)
        if ROUND:
            number = tl.load(numbers_ptr + 3).to(tl.uint32)
            key = _mixed(number * 0x9E3779B9 + seed)
            whole_row = tl.load(row_ptr + row, mask=in_rows, other=0).to(tl.uint32)
            chance = _mixed(_mixed(whole_row ^ key)[:, None] + (column + first).to(tl.uint32)) & 0xFFFF
            p = ((p.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
