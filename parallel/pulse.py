"""How far this process has come, how long its steps take, and for how long it has not come on."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Steps, and records of them, whose times are remembered, and how many are needed to judge the next by.
REMEMBERED, NEEDED = 512, 20
TIMES, SHARE = 2.0, 0.99
START, STEP, RECORD = "start", "step", "record"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run whose processes all seem to live counts as hung.

    Attributes:
        margin_s: a step may take twice the 99th percentile of the last 512 and so many seconds more; 0 turns the search
            for hangs off. `parallel.timeout_s` holds in any case.
        allowance_s: seconds for each of the first 20 steps, for an evaluation and for a save, whose time tells nothing
            of the next.
    """

    margin_s: float = 5.0
    allowance_s: float = 1800.0

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = [f"watch.margin_s={self.margin_s} must not be negative"] if self.margin_s < 0 else []
        if self.allowance_s <= 0:
            found.append(f"watch.allowance_s={self.allowance_s} must be above 0")
        return found


class Pulse:
    """What the main thread tells of itself, and another one judges by the time that it passes to it.

    Args:
        config: the limits; None where nobody judges.
        clock: seconds from any moment on.
    """

    def __init__(self, config: WatchConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.number: int | None = None
        self.doing = START
        self.idle_s = 0.0
        self._config, self._clock = config, clock
        self._since = clock()
        self._spent = 0.0
        self._times = {name: deque[float](maxlen=REMEMBERED) for name in (STEP, RECORD)}

    def step(self, number: int) -> None:
        """Step `number` is finished."""
        self._turn(STEP)
        if self.number is not None:
            self._times[STEP].append(self._spent)
        self._spent = 0.0
        self.number = number

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something other than a step goes on: `RECORD`, or what has an allowance of its own."""
        before = self.doing
        self._turn(name)
        yield
        took = self._turn(before)
        if name == RECORD:
            self._times[RECORD].append(took)

    def _turn(self, doing: str) -> float:
        """Turn to something else; the seconds that went by since the last turn."""
        now = self._clock()
        took, self._since = now - self._since, now
        if self.doing == STEP:
            self._spent += took
        self.doing, self.idle_s = doing, 0.0
        return took

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self.idle_s += seconds

    @property
    def usual_step_s(self) -> float | None:
        """Seconds of the last steps, on average; None where there are too few."""
        times = list(self._times[STEP])[-NEEDED:]
        return sum(times) / NEEDED if len(times) == NEEDED else None

    @property
    def limit_s(self) -> float:
        """How long what goes on now may take."""
        if self._config is None or not self._config.margin_s or self.doing == START:
            return math.inf
        times = sorted(self._times.get(self.doing, ()))
        if len(times) < NEEDED:
            return self._config.allowance_s
        return TIMES * times[math.ceil(SHARE * len(times)) - 1] + self._config.margin_s
