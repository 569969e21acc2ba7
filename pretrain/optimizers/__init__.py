"""Optimizers over sharded parameters, all behind one small interface."""

from .adamw import AdamW
from .adamw_8bit import AdamW8bit
from .build import build_optimizers, check_parameters
from .config import GroupConfig, MuonConfig, OptimizerConfig
from .low_rank import LowRank, LowRankConfig
from .muon import Muon
from .sharded import Optimizer
from .size import StateSize, state_size

__all__ = [
    "AdamW",
    "AdamW8bit",
    "GroupConfig",
    "LowRank",
    "LowRankConfig",
    "Muon",
    "MuonConfig",
    "Optimizer",
    "OptimizerConfig",
    "StateSize",
    "build_optimizers",
    "check_parameters",
    "state_size",
]
