"""From what all ranks hold: which step to go on from, and whose copy each rank takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...parallel.heartbeat import spans


@dataclass(frozen=True, order=True)
class Moment:
    """When a copy was made: after which step, by which start of the run, and after how many rewinds."""

    step: int
    start: int
    rewinds: int


@dataclass(frozen=True)
class Holding:
    """A copy as the rank tells of it that sees it on its machine.

    Attributes:
        seen_by: that rank.
        keeper: the rank that kept it.
        owner: the rank it is of.
        moment: when it was made.
        pieces: as in `Identity`.
        path: of its folder, on that machine.
        manifest: hash of its manifest, in which those of all its tensors are.
        misfit: why this start cannot use it; empty where it can.
    """

    seen_by: int
    keeper: int
    owner: int
    moment: Moment
    pieces: str
    path: str
    manifest: str
    misfit: str = ""


@dataclass(frozen=True)
class Plan:
    """What to go on from: a moment, and whose copy each rank takes."""

    moment: Moment
    sources: tuple[Holding, ...]

    @property
    def from_peers(self) -> list[int]:
        """The ranks that take a copy which they did not keep themselves, or not where they are now."""
        return [rank for rank, source in enumerate(self.sources) if (source.keeper, source.seen_by) != (rank, rank)]


def choose(holdings: Sequence[Holding], pieces: Sequence[str]) -> Plan | None:
    """The newest moment of which there is a copy for every rank; None where there is none.

    A rank takes a copy that lies on its machine, its own first; where there is none, that of the lowest rank.

    Args:
        holdings: of all ranks.
        pieces: what each rank must find in its copy.
    """
    fitting = [h for h in holdings if not h.misfit and h.owner < len(pieces) and h.pieces == pieces[h.owner]]
    for moment in sorted({h.moment for h in fitting}, reverse=True):
        there = [h for h in fitting if h.moment == moment]
        sources = [
            min((h for h in there if h.owner == rank), key=_distance, default=None) for rank in range(len(pieces))
        ]
        found = [source for source in sources if source is not None]
        if len(found) == len(pieces):
            return Plan(moment, tuple(found))
    return None


def why_not(holdings: Sequence[Holding], pieces: Sequence[str]) -> str:
    """Why the newest of `holdings`, of which `choose` made nothing, are of no use; empty where there are none."""
    if not holdings:
        return ""
    newest = max(h.moment for h in holdings)
    there = [h for h in holdings if h.moment == newest]
    if misfit := next((h.misfit for h in there if h.misfit), ""):
        return f"the copies in memory of step {newest.step} are of {misfit}"
    if any(h.owner >= len(pieces) or h.pieces != pieces[h.owner] for h in there):
        return f"the copies in memory of step {newest.step} are of another layout"
    missing = sorted(set(range(len(pieces))) - {h.owner for h in there})
    return f"of step {newest.step} no copy in memory is left for {name_ranks(missing)}"


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-3, 8`."""
    return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"


def peer_shift(machines: Sequence[object]) -> int:
    """By how much a rank's peer is further on, so that as many as can be have theirs on another machine.

    With equally many neighbouring ranks on each machine that is their number; 1 on a single machine, 0 without a peer.
    """
    size = len(machines)
    best, most = min(1, size - 1), 0
    for shift in range(1, size):
        apart = sum(machines[rank] != machines[(rank + shift) % size] for rank in range(size))
        if apart > most:
            best, most = shift, apart
        if most == size:
            break
    return best


def _distance(holding: Holding) -> tuple[bool, bool, int]:
    return holding.seen_by != holding.owner, holding.keeper != holding.owner, holding.seen_by
