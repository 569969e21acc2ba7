"""Matrices and configurations on which low-rank optimizers are tried, and how."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

import low_rank_references as references
from headrace.pretrain.optimizers.low_rank.config import LowRankConfig
from headrace.pretrain.optimizers.low_rank.optimizer import METHODS, LowRank

# Rows and columns that no number of ranks divides, matrices of which some ranks have no rows, experts.
SHAPES = {"tall": (10, 6), "uneven": (5, 7), "narrow": (3, 8), "few": (5, 3), "stack": (4, 6, 8)}
STEPS = 5
LR_SCALES = [1.0 - 0.1 * step for step in range(STEPS)]
GO, SKIP = torch.zeros(()), torch.ones(())
CASES = [LowRankConfig(method=method, rank=2, refresh_steps=2, lr=0.02, seed=5) for method in METHODS]
CASES.append(LowRankConfig(method="grass", rows="sampled", rank=2, refresh_steps=2, lr=0.02, seed=5))
CODED = [replace(config, state_bits=8) for config in CASES if config.method in ("grass", "subspace_momentum")]
CODED_NAMES = ["grass-8", "sampled-8", "subspace_momentum-8"]
NAMES = [f"{case.method}-{case.rows}" if case.method == "grass" else case.method for case in CASES]


def draw(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def build(config: LowRankConfig, parameters: dict[str, Tensor]) -> LowRank:
    decay = dict.fromkeys(parameters, 0.1)
    return LowRank(parameters, config, betas=references.BETAS, eps=references.EPS, weight_decay=decay)


def take_steps(optimizer: LowRank, steps: range, shard: Callable[[str, Tensor], Tensor] = lambda _, grad: grad) -> None:
    for step in steps:
        for name, grad in draw(100 + step).items():
            if name in optimizer.parameters:
                optimizer.parameters[name].grad = shard(name, grad)
        optimizer.step(LR_SCALES[step], GO)
