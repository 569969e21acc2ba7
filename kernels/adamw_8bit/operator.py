"""The public operator: one update of a parameter and its moments, in place."""

from dataclasses import astuple

import torch
from torch import Tensor

from ..dispatch import choose_backend
from .blocked import maxima_of_blocks, update_blocks
from .grid import BlockGrid
from .update import Moments, Rounding, Update


def adamw_8bit_(
    p_RC: Tensor,
    grad_RC: Tensor,
    moments: Moments,
    update: Update,
    *,
    grid: BlockGrid,
    maxima: Tensor | None = None,
    rounding: Rounding | None = None,
    backend: str = "auto",
) -> None:
    """Update a part of a parameter and its moments in place (arXiv:2110.02861; decay as in arXiv:1711.05101).

    Args:
        p_RC: the part, float64, float32 or bfloat16, contiguous; computed in float32, or float64 for float64.
        grad_RC: its gradient, of the same shape.
        moments: changed in place; scales may have more columns than the part has blocks (`grid.scale_column`).
        update: the numbers.
        grid: where blocks begin and end.
        maxima: (2, R, columns of the scales) from `block_maxima`, taken over all ranks that have parts of the blocks;
            they become the scales. None where each block lies here whole.
        rounding: how a bfloat16 parameter is rounded; None: to the nearest.
        backend: `auto`, `torch` or `triton`.

    Raises:
        ValueError: shapes or dtypes disagree, or the backend cannot run.
    """
    _check(p_RC, grad_RC, moments, grid, maxima)
    if rounding is not None and p_RC.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, this one is {p_RC.dtype}")
    seed, row_R = (0, None) if rounding is None else (rounding.seed, rounding.row_R)
    _update(
        p_RC, grad_RC, *moments, maxima, row_R, update.step, update.skip, _numbers(update), [*astuple(grid)],
        seed, choose_backend("adamw_8bit", backend, p_RC) == "triton",
    )  # fmt: skip


def block_maxima(
    grad_RC: Tensor, moments: Moments, update: Update, *, grid: BlockGrid, backend: str = "auto"
) -> Tensor:
    """The largest magnitude of both new moments in this part of each block, (2, R, columns of the scales), float32.

    Zero in blocks of which nothing lies here. A maximum over ranks makes it what `adamw_8bit_` takes.
    """
    grad_RC = grad_RC.contiguous()
    _check(grad_RC, grad_RC, moments, grid, None)
    fused = choose_backend("adamw_8bit", backend, grad_RC) == "triton"
    numbers = _numbers(update)
    return _maxima(grad_RC, *moments, update.step, update.skip, numbers, [*astuple(grid)], fused)


def _numbers(update: Update) -> list[float]:
    return [update.lr, update.beta1, update.beta2, update.eps, update.weight_decay]


def _as_update(numbers: list[float], step: Tensor, skip: Tensor) -> Update:
    lr, beta1, beta2, eps, weight_decay = numbers
    return Update(lr, beta1, beta2, eps, weight_decay, step, skip)


@torch.library.custom_op("headrace::adamw_8bit_", mutates_args=("p_RC", "codes1", "scales1", "codes2", "scales2"))
def _update(
    p_RC: Tensor,
    grad_RC: Tensor,
    codes1: Tensor,
    scales1: Tensor,
    codes2: Tensor,
    scales2: Tensor,
    maxima: Tensor | None,
    row_R: Tensor | None,
    step: Tensor,
    skip: Tensor,
    numbers: list[float],
    grid: list[int],
    seed: int,
    fused: bool,
) -> None:
    moments, update = Moments(codes1, scales1, codes2, scales2), _as_update(numbers, step, skip)
    rounding = None if row_R is None else Rounding(seed, row_R)
    if fused:
        from .fused import fused_update

        fused_update(p_RC, grad_RC.contiguous(), moments, update, BlockGrid(*grid), maxima, rounding)
    else:
        update_blocks(p_RC, grad_RC, moments, update, BlockGrid(*grid), maxima, rounding)
    if maxima is not None:
        for scales, new in zip((scales1, scales2), maxima, strict=True):
            scales.copy_(torch.where(skip > 0, scales, new))


@_update.register_fake
def _(*_inputs: object) -> None:
    return None


@torch.library.custom_op("headrace::adamw_8bit_maxima", mutates_args=())
def _maxima(
    grad_RC: Tensor,
    codes1: Tensor,
    scales1: Tensor,
    codes2: Tensor,
    scales2: Tensor,
    step: Tensor,
    skip: Tensor,
    numbers: list[float],
    grid: list[int],
    fused: bool,
) -> Tensor:
    moments, update = Moments(codes1, scales1, codes2, scales2), _as_update(numbers, step, skip)
    found = torch.zeros(2, *scales1.shape, device=grad_RC.device)
    if fused:
        from .fused import fused_maxima

        fused_maxima(grad_RC, moments, update, BlockGrid(*grid), found)
    else:
        maxima_of_blocks(grad_RC, moments, update, BlockGrid(*grid), found)
    return found


@_maxima.register_fake
def _(grad_RC: Tensor, codes1: Tensor, scales1: Tensor, *_rest: object) -> Tensor:
    return scales1.new_empty(2, *scales1.shape)


def _check(p_RC: Tensor, grad_RC: Tensor, moments: Moments, grid: BlockGrid, maxima: Tensor | None) -> None:
    rows, columns = p_RC.shape
    if grad_RC.shape != p_RC.shape:
        raise ValueError(f"the gradient has shape {tuple(grad_RC.shape)}, the parameter {tuple(p_RC.shape)}")
    if columns != grid.columns:
        raise ValueError(f"the parameter has {columns} columns and the grid {grid.columns}")
    if not p_RC.is_contiguous():
        raise ValueError(f"the parameter has strides {p_RC.stride()}; it is changed in place and must be contiguous")
    for name in ("codes1", "codes2"):
        codes = getattr(moments, name)
        if codes.shape != p_RC.shape or codes.dtype != torch.uint8 or not codes.is_contiguous():
            raise ValueError(f"{name} is {codes.dtype} {tuple(codes.shape)}; give contiguous uint8 {(rows, columns)}")
    for name in ("scales1", "scales2"):
        scales = getattr(moments, name)
        fits = scales.ndim == 2 and len(scales) == rows and scales.shape[1] >= grid.scale_column + grid.num_blocks
        if not fits or scales.dtype != torch.float32 or not scales.is_contiguous():
            raise ValueError(
                f"{name} is {scales.dtype} {tuple(scales.shape)}; give contiguous float32 of {rows} rows and "
                f"{grid.scale_column + grid.num_blocks} columns"
            )
    if maxima is not None and maxima.shape != (2, *moments.scales1.shape):
        raise ValueError(f"maxima have shape {tuple(maxima.shape)}, not {(2, *moments.scales1.shape)}")
