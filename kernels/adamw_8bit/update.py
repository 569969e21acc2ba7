"""What an update of 8-bit AdamW is given: moments, numbers, and how bfloat16 is rounded."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .code_books import zero_code


class Moments(NamedTuple):
    """Both moments of a parameter `(R, C)`: codes `(R, C)`, uint8, and scales `(R, blocks)`, float32.

    The first moment's codes are of the signed book, the second's of the unsigned one.
    """

    codes1: Tensor
    scales1: Tensor
    codes2: Tensor
    scales2: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, blocks: int, device: torch.device) -> "Moments":
        """Moments before the first update."""
        scales = [torch.zeros(rows, blocks, device=device) for _ in range(2)]
        codes = [
            torch.full((rows, columns), zero_code(signed), dtype=torch.uint8, device=device) for signed in (True, False)
        ]
        return cls(codes[0], scales[0], codes[1], scales[1])


@dataclass(frozen=True)
class Update:
    """The numbers of one AdamW update (arXiv:1711.05101, algorithm 2).

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as in the paper, the decay times the learning rate.
        step: float32 scalar on the device, this update's number, from 1 on; updates that were skipped do not count.
        skip: float32 scalar on the device; where it is 1 nothing changes.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: Tensor
    skip: Tensor


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of a bfloat16 parameter: up as often as the rest is large.

    The choice is a hash of the seed, the update's number and the element's place in the whole parameter.

    Attributes:
        seed: from 0 to 2^31 - 1.
        row_R: the whole parameter's row that each row of this part is, int64.
    """

    seed: int
    row_R: Tensor
