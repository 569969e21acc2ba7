"""Cross-entropy rows on a GPU: one kernel turns a chunk's logits into losses and gradients, two where ranks share it.

A program has one token's row of logits. It reads the row for the sums of the softmax, then once more, backwards, since
the end is what caches still hold, and writes the gradients in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch
from ..tiles import Tile, tile
from .rows import LossRules, SoftmaxSums

# Rows of logits begin at multiples of this many elements: products and loads are then aligned for every vocabulary.
ROW_ALIGNMENT = 64

_LOWEST = tl.constexpr(-3.4028234663852886e38)


def fused_rows(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, loss_T: Tensor, rules: LossRules) -> Tensor:
    """The step (`rows.RowStep`) in Triton.

    Ignored rows are zeros whatever their logits hold. A target outside the head makes the token's loss NaN, and its
    gradients.
    """
    rows = len(weight_VD)
    width = triton.cdiv(rows, ROW_ALIGNMENT) * ROW_ALIGNMENT
    logits_TV = x_TD.new_empty(len(x_TD), width)[:, :rows]
    torch.mm(x_TD, weight_VD.t(), out=logits_TV)
    if rules.shard is None:
        choice = _tile(logits_TV)
        launch(
            _cross_entropy_kernel,
            (len(target_T),),
            logits_ptr=logits_TV,
            target_ptr=target_T,
            loss_ptr=loss_T,
            num_columns=rows,
            width=width,
            target_stride=target_T.stride(0),
            ignore_index=rules.ignore_index,
            z_loss=float(rules.z_loss),
            WITH_Z=rules.z_loss != 0,
            WITH_GRADIENT=rules.with_gradient,
            BLOCK=choice["block"],
            num_warps=choice["num_warps"],
        )
        return logits_TV
    combined = rules.shard.combine(_softmax_sums(logits_TV, target_T, rules))
    _gradients_of_shard(logits_TV, target_T, loss_T, combined, rules)
    return logits_TV


def _softmax_sums(logits_TV: Tensor, target_T: Tensor, rules: LossRules) -> SoftmaxSums:
    assert rules.shard is not None
    sums_T3 = logits_TV.new_empty(len(target_T), 3, dtype=torch.float32)
    choice = _tile(logits_TV)
    launch(
        _softmax_sums_kernel,
        (len(target_T),),
        logits_ptr=logits_TV,
        target_ptr=target_T,
        sums_ptr=sums_T3,
        num_columns=logits_TV.shape[1],
        width=logits_TV.stride(0),
        target_stride=target_T.stride(0),
        ignore_index=rules.ignore_index,
        first_row=rules.shard.first_row,
        whole_rows=rules.shard.whole_rows,
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )
    return SoftmaxSums(*sums_T3.split(1, dim=1))


def _gradients_of_shard(
    logits_TV: Tensor, target_T: Tensor, loss_T: Tensor, combined: SoftmaxSums, rules: LossRules
) -> None:
    assert rules.shard is not None
    choice = _tile(logits_TV)
    launch(
        _shard_gradient_kernel,
        (len(target_T),),
        logits_ptr=logits_TV,
        target_ptr=target_T,
        loss_ptr=loss_T,
        peak_ptr=combined.peak,
        total_ptr=combined.total,
        chosen_ptr=combined.chosen,
        num_columns=logits_TV.shape[1],
        width=logits_TV.stride(0),
        target_stride=target_T.stride(0),
        peak_stride=combined.peak.stride(0),
        total_stride=combined.total.stride(0),
        chosen_stride=combined.chosen.stride(0),
        ignore_index=rules.ignore_index,
        first_row=rules.shard.first_row,
        z_loss=float(rules.z_loss),
        WITH_Z=rules.z_loss != 0,
        WITH_GRADIENT=rules.with_gradient,
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )


def scale(grad: Tensor, factor: Tensor) -> Tensor:
    """Return `grad * factor`, a contiguous tensor times a float32 scalar, multiplied in float32 in one pass."""
    out = torch.empty_like(grad)
    choice = tile("scale_gradient", architecture(grad))
    launch(
        _scale_kernel,
        (triton.cdiv(grad.numel(), choice["block"]),),
        grad_ptr=grad,
        factor_ptr=factor,
        out_ptr=out,
        size=grad.numel(),
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )
    return out


def _tile(logits_TV: Tensor) -> Tile:
    return tile("cross_entropy", architecture(logits_TV), "narrow" if logits_TV.shape[1] <= 4096 else "wide")


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    num_columns,
    width,
    target_stride,
    ignore_index,
    z_loss,
    WITH_Z: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    target = tl.load(target_ptr + row * target_stride)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WITH_GRADIENT:
            _clear_row(row_ptr, width, BLOCK)
    else:
        here = (target >= 0) & (target < num_columns)
        # Read before the sums, whose reductions keep the program together: afterwards the row is overwritten.
        chosen = tl.load(row_ptr + tl.where(here, target, 0)).to(tl.float32)
        chosen = tl.where(here, chosen, float("nan"))
        peak, total = _sums_of_row(row_ptr, num_columns, width, BLOCK)
        total = tl.where(here, total, float("nan"))
        loss, pull = _loss_of_sums(peak, total, chosen, z_loss, WITH_Z)
        tl.store(loss_ptr + row, loss)
        if WITH_GRADIENT:
            place = tl.where(here, target, -1).to(tl.int32)
            _write_gradient(row_ptr, place, peak, 1.0 / total, pull, width, WITH_Z, BLOCK)


@triton.jit
def _softmax_sums_kernel(
    logits_ptr,
    target_ptr,
    sums_ptr,
    num_columns,
    width,
    target_stride,
    ignore_index,
    first_row,
    whole_rows,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    sums_ptr += row * 3
    target = tl.load(target_ptr + row * target_stride)
    if target == ignore_index:
        tl.store(sums_ptr, 0.0)
        tl.store(sums_ptr + 1, 1.0)
        tl.store(sums_ptr + 2, 0.0)
    else:
        known = (target >= 0) & (target < whole_rows)
        target -= first_row
        here = (target >= 0) & (target < num_columns)
        chosen = tl.load(row_ptr + tl.where(here, target, 0)).to(tl.float32)
        chosen = tl.where(here, chosen, 0.0)
        peak, total = _sums_of_row(row_ptr, num_columns, width, BLOCK)
        tl.store(sums_ptr, peak)
        tl.store(sums_ptr + 1, tl.where(known, total, float("nan")))
        tl.store(sums_ptr + 2, chosen)


@triton.jit
def _shard_gradient_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    peak_ptr,
    total_ptr,
    chosen_ptr,
    num_columns,
    width,
    target_stride,
    peak_stride,
    total_stride,
    chosen_stride,
    ignore_index,
    first_row,
    z_loss,
    WITH_Z: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    target = tl.load(target_ptr + row * target_stride)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WITH_GRADIENT:
            _clear_row(row_ptr, width, BLOCK)
    else:
        peak = tl.load(peak_ptr + row * peak_stride)
        total = tl.load(total_ptr + row * total_stride)
        chosen = tl.load(chosen_ptr + row * chosen_stride)
        loss, pull = _loss_of_sums(peak, total, chosen, z_loss, WITH_Z)
        tl.store(loss_ptr + row, loss)
        if WITH_GRADIENT:
            target -= first_row
            place = tl.where((target >= 0) & (target < num_columns), target, -1).to(tl.int32)
            _write_gradient(row_ptr, place, peak, 1.0 / total, pull, width, WITH_Z, BLOCK)


@triton.jit
def _sums_of_row(row_ptr, num_columns, width, BLOCK: tl.constexpr):
    # Each lane keeps its own peak and sum, so that nothing waits for others before the end. One exponential serves:
    # whichever of the element and the peak is lower is the one to be scaled. The peak begins finite, as -inf from
    # -inf would be NaN.
    column = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    ahead = _load_columns(row_ptr, column, width, "evict_last")
    for _ in range(0, tl.cdiv(width, BLOCK)):
        x = tl.where(column < num_columns, ahead.to(tl.float32), float("-inf"))
        column += BLOCK
        ahead = _load_columns(row_ptr, column, width, "evict_last")
        lower = tl.exp(-tl.abs(x - peak))
        total = tl.where(x > peak, total * lower + 1.0, total + lower)
        peak = tl.maximum(peak, x)
    highest = tl.max(peak, 0)
    return highest, tl.sum(total * tl.exp(peak - highest), 0)


@triton.jit
def _load_columns(row_ptr, column, width, EVICTION: tl.constexpr):
    # Masked by the aligned width and not by the number of columns: loads stay vectors.
    return tl.load(row_ptr + column, mask=(column >= 0) & (column < width), other=0.0, eviction_policy=EVICTION)


@triton.jit
def _loss_of_sums(peak, total, chosen, z_loss, WITH_Z: tl.constexpr):
    # The loss, and its derivative by the logarithm of the sum beyond the 1 of the cross-entropy.
    log_total = tl.log(total)
    loss = log_total + (peak - chosen)
    pull = 0.0
    if WITH_Z:
        log_sum = log_total + peak
        loss += z_loss * log_sum * log_sum
        pull = 2.0 * z_loss * log_sum
    return loss, pull


@triton.jit
def _write_gradient(row_ptr, place, peak, scale, pull, width, WITH_Z: tl.constexpr, BLOCK: tl.constexpr):
    num_blocks = tl.cdiv(width, BLOCK)
    column = (num_blocks - 1) * BLOCK + tl.arange(0, BLOCK)
    ahead = _load_columns(row_ptr, column, width, "evict_first")
    for _ in range(0, num_blocks):
        x = ahead.to(tl.float32)
        ahead = _load_columns(row_ptr, column - BLOCK, width, "evict_first")
        probability = tl.exp(x - peak) * scale
        gradient = tl.where(column == place, probability - 1.0, probability)
        if WITH_Z:
            gradient += probability * pull
        tl.store(row_ptr + column, gradient, mask=column < width)
        column -= BLOCK


@triton.jit
def _clear_row(row_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        tl.store(row_ptr + start + i, tl.zeros((BLOCK,), tl.float32), mask=start + i < width)


@triton.jit
def _scale_kernel(grad_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, grad * tl.load(factor_ptr), mask=i < size)
