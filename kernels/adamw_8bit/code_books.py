"""The 256 values a moment may take, in units of its block's largest (arXiv:2110.02861, section 1.3)."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

DECADES = 7


@dataclass(frozen=True)
class CodeBook:
    """Values in ascending order, and what finds the nearest of them in two reads.

    Attributes:
        values: (256,) float32.
        thresholds: (256,) float32; above the c-th a number is nearer to value c + 1 than to value c. The last is
            infinite.
        cells: (65536,) int32; the code of the least number whose float32 begins with these 16 bits. No such cell holds
            more than one threshold.
    """

    values: Tensor
    thresholds: Tensor
    cells: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """The codes (int32) of the values nearest to `x`, float32 of any shape; the lower of two as near."""
        cell = x.contiguous().view(torch.int32).flatten().bitwise_right_shift(16).bitwise_and_(0xFFFF)
        code = self.cells.index_select(0, cell)
        return code.add_(x.flatten() > self.thresholds.index_select(0, code)).view(x.shape)

    def lookup(self, codes: Tensor) -> Tensor:
        """The values (float32) of `codes`, uint8 of any shape."""
        return self.values.index_select(0, codes.flatten().int()).view(codes.shape)


def zero_code(signed: bool) -> int:
    """The code of zero: so many values are below it."""
    return 2**DECADES - 1 if signed else 0


def dynamic_values(signed: bool) -> Tensor:
    """Zero, one, and decades [10^-e, 10^(1-e)), e = 7..1, each cut evenly, the larger ones the finer; the centres.

    The lowest decade has one value (two when unsigned), each other twice as many as the one below it; `signed` mirrors
    all but zero and one.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        bounds = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        centres = 10.0 ** (decade + 1 - DECADES) * ((bounds[:-1] + bounds[1:]) / 2.0)
        parts += [centres, -centres] if signed else [centres]
    return torch.cat(parts).sort().values


@cache
def code_book(signed: bool, device: torch.device) -> CodeBook:
    """The book for first moments (`signed`) or second ones, on `device`; kept, and so never of fake tensors."""
    with unset_fake_temporarily():
        return _make_book(signed, device)


def _make_book(signed: bool, device: torch.device) -> CodeBook:
    values = dynamic_values(signed)
    thresholds = torch.cat([_thresholds(values), torch.tensor([torch.inf])])
    prefixes = torch.arange(1 << 16, dtype=torch.int32) << 16
    # Of negative numbers the largest magnitude is the least.
    least = torch.where(prefixes < 0, prefixes | 0xFFFF, prefixes).view(torch.float32)
    cells = torch.bucketize(least, thresholds[:-1], out_int32=True)
    return CodeBook(values.to(device), thresholds.to(device), cells.to(device))


def _thresholds(values: Tensor) -> Tensor:
    """The last float32 between each two neighbours that is no farther from the lower one, as float32 subtracts."""
    lower, upper = values[:-1], values[1:]
    found = (lower + upper) / 2.0
    for _ in range(8):  # the midpoint itself is rounded: a few steps to either side settle it
        above = torch.nextafter(found, upper)
        found = torch.where(above - lower <= upper - above, above, found)
        found = torch.where(found - lower > upper - found, torch.nextafter(found, lower), found)
    return found
