"""Stochastic rounding to bfloat16 whose choices do not depend on how a parameter is cut."""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def round_stochastically(x: Tensor, seed: int, step: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`x` (float32) rounded to bfloat16, up with the probability that keeps the mean.

    `row` and `column` are an element's place in the whole parameter and broadcast against `x`; with `seed` and `step`,
    an update's number, they decide.
    """
    key = _mixed(seed + step.long() * GOLDEN)
    chance = _mixed(_mixed(row ^ key) + column) & 0xFFFF
    bits = x.contiguous().view(torch.int32) + chance.int()
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    """A word of 32 bits, every bit of which depends on every bit of `x`; two rounds of multiply and shift."""
    x = x & WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
