"""Which low-rank method, in how large a subspace, renewed how often."""

import math
from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "galore", "online_subspace", "grass", "flora", "grass_walk", "grass_jump", "subset_norm", "subspace_momentum"
]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """The numbers of low-rank methods; decay rates, `eps` and weight decay are those of `optimizer`.

    A method reads the fields that say so below. `subset_norm` knows no subspace and no chance: it reads `lr` alone.

    Attributes:
        method: one of the files of `pretrain/optimizers/low_rank`; `subspace_momentum` comes with `subset_norm`.
        lr: peak learning rate of the matrices.
        min_side: matrices with a smaller side than this go to AdamW, as what is no matrix; all methods.
        rank: dimension of the subspace, at most the smaller size of every matrix; not `subset_norm`.
        state_bits: of moments inside the subspace, 8 as codes with a scale for 256 of them; not `subset_norm`.
        scale: what lifted updates are multiplied by (alpha of GaLore); not `subset_norm` and `subspace_momentum`.
        refresh_steps: updates between two choices of a basis; not `subset_norm` and `online_subspace`, whose basis
            moves in every update.
        seed: of random bases, test matrices and samples.
        basis_lr_ratio: learning rate of the basis as a multiple of `lr`; `online_subspace`.
        basis_penalty: weight of the basis' distance from orthonormal; `online_subspace`.
        rows: `top` takes the rows of largest gradient, `sampled` draws them by their gradients' norms; `grass`.
        walk_angle: largest angle between a subspace and the next, radians; `grass_walk`.
        growth_limit: the gradient's rest outside the subspace may grow by this factor in one update; `grass_walk` and
            `grass_jump`.
    """

    method: MethodName = "galore"
    lr: float = 0.01
    min_side: int = 0
    rank: int = 128
    state_bits: Literal[32, 8] = 32
    scale: float = 0.25
    refresh_steps: int = 200
    seed: int = 0
    basis_lr_ratio: float = 5.0
    basis_penalty: float = 1.0
    rows: Literal["top", "sampled"] = "top"
    walk_angle: float = 0.1
    growth_limit: float = 1.01

    def state_facts(self) -> dict[str, str | int]:
        """What the state means: it goes on only under the same. Flora's momentum is nothing without its matrices."""
        names = (
            "method",
            "rank",
            "min_side",
            "state_bits",
            *(("seed", "refresh_steps") if self.method == "flora" else ()),
        )
        return {name: getattr(self, name) for name in names}

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        for name in ("lr", "scale", "basis_lr_ratio", "walk_angle"):
            if not 0.0 < (value := getattr(self, name)) < math.inf:
                found.append(f"optimizer.low_rank.{name}={value} must be positive and finite")
        for name in ("rank", "refresh_steps"):
            if (value := getattr(self, name)) < 1:
                found.append(f"optimizer.low_rank.{name}={value} must be at least 1")
        if not 0.0 <= self.basis_penalty < math.inf:
            found.append(f"optimizer.low_rank.basis_penalty={self.basis_penalty} must be finite and not negative")
        if not 1.0 < self.growth_limit < math.inf:
            found.append(f"optimizer.low_rank.growth_limit={self.growth_limit} must be above 1 and finite")
        for name in ("min_side", "seed"):
            if (value := getattr(self, name)) < 0:
                found.append(f"optimizer.low_rank.{name}={value} must not be negative")
        return found
