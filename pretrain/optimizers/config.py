"""Which optimizer updates which parameter, and how strongly."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon's own numbers; its matrices share the run's weight decay.

    Attributes:
        lr: peak learning rate; updates are scaled to AdamW's typical size (arXiv:2502.16982 equation 4).
        momentum: decay of the momentum buffer.
        iterations: Newton-Schulz iterations.
    """

    lr: float = 0.01
    momentum: float = 0.95
    iterations: int = 5

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if not 0.0 < self.lr < math.inf:
            found.append(f"optimizer.muon.lr={self.lr} must be positive and finite")
        if not 0.0 <= self.momentum < 1.0:
            found.append(f"optimizer.muon.momentum={self.momentum} must be at least 0 and below 1")
        if self.iterations < 1:
            found.append(f"optimizer.muon.iterations={self.iterations} must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices inside the layers and AdamW for the rest.

    Attributes:
        kind: `adamw` or `muon`.
        lr: AdamW's peak learning rate.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's denominator floor.
        weight_decay: decoupled decay of matrices; norms, biases, `A_log`, `D`, `dt_bias` and convolutions have none.
        muon: Muon's numbers, read when `kind` is `muon`.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon: MuonConfig = field(default_factory=MuonConfig)

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if not 0.0 < self.lr < math.inf:
            found.append(f"optimizer.lr={self.lr} must be positive and finite")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            found.append(f"optimizer.betas={list(self.betas)} must each be at least 0 and below 1")
        if not 0.0 < self.eps < math.inf:
            found.append(f"optimizer.eps={self.eps} must be positive and finite")
        if not 0.0 <= self.weight_decay < math.inf:
            found.append(f"optimizer.weight_decay={self.weight_decay} must be finite and not negative")
        return found + self.muon.problems()
