"""How long a run trains between two saves, from what saves have cost it."""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median

# Nothing is known of the cost before the first save.
FIRST_S = 60.0
REMEMBERED = 5
# A save beside training is to be over well before the next.
BACKGROUND_TIMES = 2.0


class SaveInterval:
    """Tells when the next save is due.

    With C the seconds that a save stops training for (the median of the last few) and M those between two failures, the
    least is lost, by saves and by steps done again, when saves are sqrt(2 C M) apart (Young, CACM 17(9), 1974).
    They never come so close that they cost more than their share of the time: C / share.

    Args:
        time_share: of the time, that saves may cost.
        failure_every_s: M.
        now: a clock, in seconds.
    """

    def __init__(self, time_share: float, failure_every_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._time_share, self._failure_every_s, self._now = time_share, failure_every_s, now
        self._costs: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._last_s = now()

    @property
    def seconds(self) -> float:
        """From the end of a save to the next."""
        if not self._costs:
            return FIRST_S
        blocked_s, background_s = (median(values) for values in zip(*self._costs, strict=True))
        least = max(blocked_s / self._time_share, background_s * BACKGROUND_TIMES)
        return max(least, math.sqrt(2 * blocked_s * self._failure_every_s))

    def is_due(self) -> bool:
        """Whether that time is over."""
        return self._now() - self._last_s >= self.seconds

    def begin(self) -> None:
        """A save begins, or is given up: the next is as far away as after one."""
        self._last_s = self._now()

    def add(self, blocked_s: float, background_s: float) -> None:
        """A save is done; training stood still for `blocked_s`, and it took `background_s` more beside it."""
        self._costs.append((blocked_s, background_s))
