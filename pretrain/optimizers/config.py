"""Which optimizer updates which parameter, and how strongly."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .low_rank.config import LowRankConfig


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
class GroupConfig:
    """What is different for the parameters whose names match; the first group that does counts.

    Attributes:
        names: a pattern of the shell (`*`, also for dots, `?`, `[...]`) over whole names, as `layers.*.router.*`.
        lr_scale: factor on the learning rate.
        weight_decay: instead of the run's; None keeps that.
    """

    names: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if not 0.0 <= self.lr_scale < math.inf:
            found.append(f"optimizer.groups: lr_scale={self.lr_scale} must be finite and not negative")
        if self.weight_decay is not None and not 0.0 <= self.weight_decay < math.inf:
            found.append(f"optimizer.groups: weight_decay={self.weight_decay} must be finite and not negative")
        return found


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or another for the matrices inside the layers and AdamW for the rest.

    Attributes:
        kind: `adamw`, `muon` or `low_rank`.
        lr: AdamW's peak learning rate.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's denominator floor.
        weight_decay: decoupled decay of matrices; norms, biases, `A_log`, `D` and `dt_bias` have none.
        state_bits: of AdamW's moments; with 8, matrices and the head have 8-bit codes, and what is small or sensitive
            (`A_log`, `D`, `dt_bias`, norms, biases, convolutions, routers, embeddings) keeps 32 bits.
        implementation: what computes AdamW with 32-bit moments: torch's fused kernels, or NVIDIA Apex's where they are
            installed.
        embedding_bits: of the embedding's moments where `state_bits` is 8.
        block_size: columns that share a scale of 8-bit moments.
        min_8bit_size: parameters with fewer elements keep 32 bits.
        stochastic_rounding: whether bfloat16 parameters with 8-bit moments are rounded up or down by chance, so that
            updates smaller than their last digit count on average.
        groups: parameters with a learning rate or weight decay of their own.
        muon: Muon's numbers, read when `kind` is `muon`.
        low_rank: a low-rank method's numbers, read when `kind` is `low_rank`; it shares betas, eps and weight decay.
    """

    kind: Literal["adamw", "muon", "low_rank"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    state_bits: Literal[32, 8] = 32
    implementation: Literal["torch", "apex"] = "torch"
    embedding_bits: Literal[32, 8] = 32
    block_size: int = 256
    min_8bit_size: int = 4096
    stochastic_rounding: bool = False
    groups: tuple[GroupConfig, ...] = ()
    muon: MuonConfig = field(default_factory=MuonConfig)
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    @property
    def words(self) -> str:
        """What updates the parameters, in words."""
        fused = {"torch": "torch's fused AdamW", "apex": "NVIDIA Apex's fused AdamW"}[self.implementation]
        adamw = (
            f"{fused}, 32-bit moments"
            if self.state_bits == 32
            else f"AdamW, 8-bit moments in blocks of {self.block_size}"
        )
        if self.kind == "adamw":
            return adamw
        return f"{'Muon' if self.kind == 'muon' else self.low_rank.method} for matrices; for the rest {adamw}"

    def state_facts(self) -> dict[str, str | int]:
        """What the optimizer's state is made of: state goes on only under the same."""
        facts: dict[str, str | int] = {"kind": self.kind, "state_bits": self.state_bits}
        if self.state_bits == 8:
            facts |= {name: getattr(self, name) for name in ("embedding_bits", "block_size", "min_8bit_size")}
        if self.kind == "low_rank":
            facts |= {f"low_rank.{name}": value for name, value in self.low_rank.state_facts().items()}
        return facts

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
        if self.embedding_bits == 8 and self.state_bits == 32:
            found.append("optimizer.embedding_bits=8 goes with optimizer.state_bits=8")
        if not 16 <= self.block_size <= 4096:
            found.append(f"optimizer.block_size={self.block_size} must be between 16 and 4096")
        if self.min_8bit_size < 0:
            found.append(f"optimizer.min_8bit_size={self.min_8bit_size} must not be negative")
        for group in self.groups:
            found += group.problems()
        return found + self.muon.problems() + self.low_rank.problems()
