"""Low-rank and reduced-state optimizers for matrices, one short file for each method."""

from .config import LowRankConfig
from .optimizer import METHODS, LowRank, check_rank

__all__ = ["METHODS", "LowRank", "LowRankConfig", "check_rank"]
