"""Low-rank and reduced-state optimizers for matrices, one short file for each method."""

from .config import LowRankConfig
from .optimizer import LowRank

__all__ = ["LowRank", "LowRankConfig"]
