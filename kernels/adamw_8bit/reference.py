"""The definition of 8-bit AdamW: whole rows, one block after the other (arXiv:2110.02861, section 2)."""

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .code_books import dynamic_values
from .update import Moments, Update


def quantise(x_RC: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """The codes (R, C), uint8, and scales (R, blocks), float32, of `x_RC`: per block its largest magnitude.

    Of two values as near the lower is taken. A block whose largest magnitude is below float32's least normal number is
    all zero.
    """
    values, codes, scales = dynamic_values(signed), [], []
    for block in x_RC.split(block_size, 1):
        scale = block.abs().amax(1, keepdim=True).float()
        inverse = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1.0 / scale)
        distance = ((block * inverse).float()[..., None] - values).abs()
        codes.append(distance.argmin(-1).to(torch.uint8))
        scales.append(scale)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def dequantise(codes_RC: Tensor, scales_Rb: Tensor, signed: bool, block_size: int) -> Tensor:
    """The float32 numbers that codes and scales stand for (R, C)."""
    each = scales_Rb.repeat_interleave(block_size, 1)[:, : codes_RC.shape[1]]
    return dynamic_values(signed)[codes_RC.int()] * each


def adamw_8bit_reference(
    p_RC: Tensor, grad_RC: Tensor, moments: Moments, update: Update, block_size: int
) -> tuple[Tensor, Moments]:
    """The parameter and the moments after one update, as new tensors; `p_RC` keeps its dtype.

    Moments are taken from their codes, moved, used as they are, and only then rounded to codes again.
    """
    if bool(update.skip):
        return p_RC, moments
    dtype = compute_dtype(p_RC)
    grad = grad_RC.to(dtype)
    first = dequantise(moments.codes1, moments.scales1, True, block_size).to(dtype)
    second = dequantise(moments.codes2, moments.scales2, False, block_size).to(dtype)
    first = update.beta1 * first + (1.0 - update.beta1) * grad
    second = update.beta2 * second + (1.0 - update.beta2) * grad.square()
    number = float(update.step)
    mean = first / (1.0 - update.beta1**number)
    spread = (second / (1.0 - update.beta2**number)).sqrt()
    p = p_RC.to(dtype) * (1.0 - update.lr * update.weight_decay) - update.lr * mean / (spread + update.eps)
    quantised = [*quantise(first, True, block_size), *quantise(second, False, block_size)]
    return p.to(p_RC.dtype), type(moments)(*quantised)
