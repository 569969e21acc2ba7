"""Which tokens of a row each rank of the context-parallel axis holds."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """A row cut into segments in order: segment s is `[bounds[s], bounds[s + 1])` and lies on rank `owners[s]`.

    Segments may have any length from one token on. A rank's tokens are its segments one behind the other.
    """

    owners: tuple[int, ...]
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) != len(self.owners) + 1 or self.bounds[0] or any(a >= b for a, b in pairwise(self.bounds)):
            raise ValueError(f"bounds={self.bounds} do not cut a row into {len(self.owners)} segments that hold tokens")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.bounds[-1]

    @property
    def num_ranks(self) -> int:
        """Ranks of the axis."""
        return max(self.owners) + 1

    def of_rank(self, rank: int) -> list[int]:
        """The segments of a rank, in order."""
        return [s for s, owner in enumerate(self.owners) if owner == rank]

    def span(self, segment: int) -> slice:
        """The place of a segment in the row."""
        return slice(self.bounds[segment], self.bounds[segment + 1])

    def lengths(self, rank: int) -> list[int]:
        """Lengths of a rank's segments."""
        return [self.bounds[s + 1] - self.bounds[s] for s in self.of_rank(rank)]

    @property
    def most_tokens(self) -> int:
        """Tokens of the rank that holds most."""
        return max(sum(self.lengths(rank)) for rank in range(self.num_ranks))

    def take(self, row: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's part of a tensor that has the whole row along `dim`."""
        parts = [row[(slice(None),) * dim + (self.span(s),)] for s in self.of_rank(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def place(self, segment: int) -> slice:
        """The place of a segment among its rank's own tokens."""
        return self.places[segment]

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """`place` of every segment."""
        filled = dict.fromkeys(self.owners, 0)
        found = []
        for s, owner in enumerate(self.owners):
            length = self.bounds[s + 1] - self.bounds[s]
            found.append(slice(filled[owner], filled[owner] + length))
            filled[owner] += length
        return tuple(found)

    @cached_property
    def runs(self) -> tuple[range, ...]:
        """Segments that follow each other on one rank, joined: between runs, and only there, something is sent."""
        starts = [s for s, owner in enumerate(self.owners) if s == 0 or owner != self.owners[s - 1]]
        return tuple(range(a, b) for a, b in pairwise([*starts, len(self.owners)]))


def cut_evenly(length: int, parts: int) -> tuple[int, ...]:
    """Bounds of `parts` stretches whose lengths differ by one at most, longer ones first."""
    return tuple(i * (length // parts) + min(i, length % parts) for i in range(parts + 1))


def contiguous(length: int, ranks: int, virtual: int = 1) -> SequenceLayout:
    """One stretch each, in order of ranks, worked on as `virtual` segments."""
    owners = tuple(r for r in range(ranks) for _ in range(virtual))
    return SequenceLayout(owners, cut_evenly(length, len(owners)))


def zigzag(length: int, ranks: int, virtual: int = 1) -> SequenceLayout:
    """Two stretches each, the r-th and the r-th from the end, so that all see as much of the past; one on one rank."""
    order = [*range(ranks), *reversed(range(ranks))] if ranks > 1 else [0]
    owners = tuple(r for r in order for _ in range(virtual))
    return SequenceLayout(owners, cut_evenly(length, len(owners)))


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}
