"""Copies of the training state in the memory of its machine and of another one, for starts after a crash."""

from .copies import KEEP, Job, Kept, MemoryCopies
from .folder import check_private
from .identity import Identity, describe_pieces, digest_of
from .plan import name_ranks

__all__ = [
    "KEEP",
    "Identity",
    "Job",
    "Kept",
    "MemoryCopies",
    "check_private",
    "describe_pieces",
    "digest_of",
    "name_ranks",
]
