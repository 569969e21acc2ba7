"""What tests of expert operators are given: choices of experts of every kind, and numbers."""

import torch
from torch import Tensor


def chosen(kind: str, T: int, k: int, X: int, seed: int = 0) -> Tensor:
    """Which expert each copy goes to; of `dropped` copies a third go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    uniform_Tk = torch.randint(X, (T, k), generator=generator)
    return {
        "uniform": uniform_Tk,
        "one expert": torch.full((T, k), X // 2),
        "dropped": uniform_Tk.masked_fill(torch.rand(T, k, generator=generator) < 0.33, -1),
        "nobody": torch.full((T, k), -1),
    }[kind]


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
