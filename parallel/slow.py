"""Which ranks make the others wait: every process tells how long a step keeps it busy itself."""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .hang import waits_now
from .pulse import STEP, Pulse

# Looks at the main thread, twenty a second, that a share is taken from: it is right to 4% of the step (one sigma).
LOOKS = 160
FACTOR = 1.3
# Of a step, that others lose: less says nothing, given how the share is measured.
LEAST_LOSS = 0.2
# Comparisons in a row, one with each beat, before a rank is told of.
PERSISTENT = 3


class BusyShare:
    """How much of a step this process spends on its own work, by looking at its main thread now and then.

    On GPUs this is the host's time: a wait for the device counts as work, since Python does not show what the device
    waits for.

    Args:
        pulse: what the main thread tells; nothing but steps is looked at.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._looks: deque[bool] = deque(maxlen=LOOKS)

    def look(self) -> None:
        """Take note of whether the main thread waits for other processes now."""
        if self._pulse.doing == STEP:
            self._looks.append(not waits_now())

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Of its own work in a usual step, and of the whole step; None before there were enough looks and steps."""
        step_s = self._pulse.usual_step_s
        if step_s is None or len(self._looks) < LOOKS:
            return None
        return step_s * sum(self._looks) / LOOKS, step_s


@dataclass(frozen=True)
class SlowRank:
    """A process that others wait for.

    Attributes:
        rank, host: who.
        own_s: seconds of a step that it works itself.
        others_s: the median of the others.
    """

    rank: int
    host: str
    own_s: float
    others_s: float


class SlowRanks:
    """Compares what all processes tell; each slow one is told of once, until it was as fast as the rest again."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def compare(self, told: Mapping[int, tuple[str, tuple[float, float] | None]]) -> list[SlowRank]:
        """Those that have just been found slow, given the host and what each rank last told of itself."""
        known = {rank: (host, *seconds) for rank, (host, seconds) in told.items() if seconds is not None}
        ordered = sorted(own_s for _, own_s, _ in known.values())
        found = []
        for rank, (host, own_s, step_s) in known.items():
            others_s = median_of_others(ordered, own_s)
            if own_s <= max(FACTOR * others_s, others_s + LEAST_LOSS * step_s):
                self._counts.pop(rank, None)
                continue
            self._counts[rank] = self._counts.get(rank, 0) + 1
            if self._counts[rank] == PERSISTENT:
                found.append(SlowRank(rank, host, own_s, others_s))
        return found


def median_of_others(ordered: Sequence[float], own: float) -> float:
    """The median of ascending values without `own`, which is one of them; itself where there is no other."""
    count, left_out = len(ordered) - 1, bisect_left(ordered, own)
    if not count:
        return own
    low, high = ((index if index < left_out else index + 1) for index in ((count - 1) // 2, count // 2))
    return ordered[low] if low == high else (ordered[low] + ordered[high]) / 2
