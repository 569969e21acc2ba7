"""8-bit AdamW in PyTorch, on any device: a few rows at a time, so that what is computed stays within cache."""

import torch
from torch import Tensor

from ..numerics import blocks, compute_dtype
from .code_books import CodeBook, code_book
from .grid import BlockGrid
from .rounding import round_stochastically
from .update import Moments, Rounding, Update

TINY = torch.finfo(torch.float32).tiny


def update_blocks(
    p_RC: Tensor,
    grad_RC: Tensor,
    moments: Moments,
    update: Update,
    grid: BlockGrid,
    maxima: Tensor | None,
    rounding: Rounding | None,
) -> None:
    """`adamw_8bit_`, but for writing `maxima` to the scales."""
    keep, number = update.skip > 0, update.step.double()
    step_size, root = update.lr / (1.0 - update.beta1**number), (1.0 - update.beta2**number).sqrt()
    for rows in blocks(len(p_RC), grid.columns, at_least=1):
        for columns, scales, wide in grid.pieces:
            part = (rows, columns)
            p = p_RC[part].unflatten(1, (-1, wide))
            first, second = _moved(grad_RC[part].unflatten(1, (-1, wide)), moments, update, part, (rows, scales))
            if maxima is None:
                scale1, scale2 = first.abs().amax(-1).float(), second.amax(-1).float()
                _write(moments.scales1[rows, scales], scale1, keep)
                _write(moments.scales2[rows, scales], scale2, keep)
            else:
                scale1, scale2 = maxima[:, rows, scales]
            _write_codes(moments.codes1[part], first, scale1, code_book(True, p.device), keep)
            _write_codes(moments.codes2[part], second, scale2, code_book(False, p.device), keep)
            moved = p.to(first.dtype) * (1.0 - update.lr * update.weight_decay)
            moved.sub_(first.mul_(step_size).div_(second.sqrt_().div_(root).add_(update.eps)))
            if rounding is not None:
                column_C = torch.arange(columns.start, columns.stop, device=p.device) + grid.first
                moved = round_stochastically(
                    moved, rounding.seed, update.step, rounding.row_R[rows][:, None, None], column_C.view(-1, wide)
                )
            _write(p, moved.to(p.dtype), keep)


def maxima_of_blocks(grad_RC: Tensor, moments: Moments, update: Update, grid: BlockGrid, found: Tensor) -> None:
    """`block_maxima`, written into `found`."""
    for rows in blocks(len(grad_RC), grid.columns, at_least=1):
        for columns, scales, wide in grid.pieces:
            part = (rows, columns)
            first, second = _moved(grad_RC[part].unflatten(1, (-1, wide)), moments, update, part, (rows, scales))
            found[0, rows, scales] = first.abs().amax(-1).float()
            found[1, rows, scales] = second.amax(-1).float()


def _moved(
    grad: Tensor, moments: Moments, update: Update, part: tuple[slice, slice], scales: tuple[slice, slice]
) -> tuple[Tensor, Tensor]:
    """Both moments (rows, blocks, columns of a block) with the gradient folded in, not yet rounded."""
    grad = grad.to(compute_dtype(grad))
    found = []
    for codes, scale, signed in (
        (moments.codes1, moments.scales1, True),
        (moments.codes2, moments.scales2, False),
    ):
        value = code_book(signed, grad.device).lookup(codes[part]).view(grad.shape)
        found.append(value.mul_(scale[scales][..., None]).to(grad.dtype))
    first, second = found
    first.mul_(update.beta1).add_(grad, alpha=1.0 - update.beta1)
    second.mul_(update.beta2).addcmul_(grad, grad, value=1.0 - update.beta2)
    return first, second


def _write_codes(codes: Tensor, moment: Tensor, scale: Tensor, book: CodeBook, keep: Tensor) -> None:
    inverse = torch.where(scale < TINY, 0.0, scale.reciprocal())
    nearest = book.nearest((moment * inverse[..., None]).float())
    _write(codes, nearest.view(codes.shape).to(torch.uint8), keep)


def _write(target: Tensor, new: Tensor, keep: Tensor) -> None:
    target.copy_(torch.where(keep, target, new))
