"""What a run's time went into, over all its starts, from `starts.jsonl` alone. Loads no torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

# Parts of the whole in the order they are shown, and in words.
PARTS = {
    "training_s": "training steps that count",
    "lost_s": "lost steps, trained again",
    "skipped_s": "skipped updates",
    "startup_s": "start-up",
    "evaluation_s": "evaluation",
    "saving_s": "saves",
    "closing_s": "closing",
    "waiting_s": "waiting between starts",
}
_FIGURES = ("tokens", "step_s", "skipped_s")
# Of tokens, and of seconds: beyond it lies no run, and sums could overflow.
BOUND = 1e18


@dataclass(frozen=True)
class Point:
    """How far a start had come: after `step`, of which it had trained `step_s` seconds, `skipped_s` of them in vain."""

    step: int
    tokens: float
    step_s: float
    skipped_s: float


@dataclass
class Start:
    """One start of a run as its records tell.

    Attributes:
        number: from 1.
        began_s: seconds since 1970 when the process began.
        steps: of the whole run, as this start wanted it.
        points: the first is where training went on; empty where it did not come so far.
        parts: seconds in each phase until the last record.
        status: `finished`, `stopped` or `error`; empty of one that goes on, or was killed.
    """

    number: int
    began_s: float
    steps: int | None = None
    points: list[Point] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    status: str = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds until the last record."""
        return sum(self.parts.values())

    @property
    def unfinished_s(self) -> float:
        """Seconds in a step that had not ended at the last record."""
        return self.parts.get("train", 0.0) - (self.points[-1].step_s if self.points else 0.0)

    def until(self, step: float) -> tuple[float, float]:
        """Seconds of training until `step`, and those of them in skipped updates."""
        if not self.points or step <= self.points[0].step:
            return 0.0, 0.0
        before = self.points[0]
        for point in self.points:
            if point.step >= step:
                share = (step - before.step) / (point.step - before.step)
                return (
                    before.step_s + share * (point.step_s - before.step_s),
                    before.skipped_s + share * (point.skipped_s - before.skipped_s),
                )
            before = point
        return before.step_s, before.skipped_s


@dataclass(frozen=True)
class Goodput:
    """The seconds of a run from its first start to its last record; the parts of `PARTS` sum to `wall_s`.

    Attributes:
        starts: how often the run was started.
        lost_steps: done, and done again later, because no checkpoint held them.
        wall_s: the whole. Clocks of machines that disagree do not make a wait negative: it counts as none.
        training_s: steps that count.
        lost_s: steps done again later, and steps under way when a start ended.
        skipped_s: updates skipped for a non-finite gradient, as their share of the steps they were among.
        startup_s: from the start of rank 0's process to its first step.
        evaluation_s, saving_s: training waited for these.
        closing_s: after the last step.
        waiting_s: no process was there, or none that left a record.
    """

    starts: int
    lost_steps: int
    wall_s: float
    training_s: float
    lost_s: float
    skipped_s: float
    startup_s: float
    evaluation_s: float
    saving_s: float
    closing_s: float
    waiting_s: float

    @property
    def fraction(self) -> float:
        """The share of the time that went into steps that count."""
        return self.training_s / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, float]:
        """All figures, and the fraction."""
        return {key: round(value, 3) for key, value in asdict(self).items()} | {"fraction": round(self.fraction, 4)}

    def rows(self) -> list[tuple[str, float, float]]:
        """Each part in words, in seconds and as a share of the whole."""
        seconds = asdict(self)
        return [(words, seconds[key], seconds[key] / (self.wall_s or 1.0)) for key, words in PARTS.items()]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `starts.jsonl` that are records; none where there is no file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("start"), int) and "kind" in record:
            yield record


def is_number(value: object) -> bool:
    """Whether a value out of a JSON record is a finite number that a run can have come to."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -BOUND < value < BOUND


def is_count(value: object) -> bool:
    """Whether it is a whole one, not below 0."""
    return isinstance(value, int) and is_number(value) and value >= 0


def _fits(record: dict[str, Any]) -> bool:
    """Whether a record has the shape that `RunClock` writes; else it is passed over like a line cut short."""
    parts = record.get("parts", {})
    return (
        (record["kind"] != "start" or is_number(record.get("time")))
        and ("step" not in record or (is_count(record["step"]) and all(is_number(record.get(k)) for k in _FIGURES)))
        and (record.get("steps") is None or is_count(record["steps"]))
        and isinstance(record.get("status", ""), str)
        and isinstance(parts, dict)
        and all(map(is_number, parts.values()))
    )


def read_starts(path: Path) -> list[Start]:
    """The starts in a `starts.jsonl`, in order; records that have another shape are passed over.

    Raises:
        UserError: the file cannot be read.
    """
    starts: list[Start] = []
    for record in filter(_fits, read_records(path)):
        if record["kind"] == "start":
            starts.append(Start(record["start"], record["time"]))
        if not starts or record["start"] != starts[-1].number or "parts" not in record:
            continue
        start = starts[-1]
        start.parts = record["parts"]
        start.steps = record.get("steps", start.steps)
        start.status = record.get("status", "")
        if "step" in record:
            point = Point(record["step"], *(record[key] for key in _FIGURES))
            # What is known later of the same step is known better.
            is_again = bool(start.points) and start.points[-1].step == point.step
            start.points[len(start.points) - is_again :] = [point]
    return starts


def steps_that_stay(starts: Sequence[Start]) -> list[float]:
    """For each start the step beyond which a later one went over its steps again; infinite where none did."""
    limits, limit = [], float("inf")
    for start in reversed(starts):
        limits.append(limit)
        if start.points:
            limit = min(limit, start.points[0].step)
    return limits[::-1]


def starts_in_vain(starts: Sequence[Start]) -> int:
    """How many starts at the end of the list took the run no further and were not asked to stop."""
    furthest, in_vain = 0, 0
    for start in starts:
        last = start.points[-1].step if start.points else 0
        in_vain = 0 if last > furthest or start.status in ("finished", "stopped") else in_vain + 1
        furthest = max(furthest, last)
    return in_vain


def measure_goodput(starts: Sequence[Start]) -> Goodput | None:
    """The parts of a run's time; None where nothing is on record."""
    starts = list(starts)
    while len(starts) > 1 and _found_all_done(starts[-1]):
        starts.pop()
    if not starts:
        return None
    training = lost = skipped = waiting = 0.0
    lost_steps = 0
    for number, (start, limit) in enumerate(zip(starts, steps_that_stay(starts), strict=True)):
        kept_s, kept_skipped_s = start.until(limit)
        all_s = start.points[-1].step_s if start.points else 0.0
        is_under_way = number == len(starts) - 1 and not start.status
        training += kept_s - kept_skipped_s + (start.unfinished_s if is_under_way else 0.0)
        lost += all_s - kept_s + (0.0 if is_under_way else start.unfinished_s)
        skipped += kept_skipped_s
        if start.points:
            lost_steps += int(max(0, start.points[-1].step - max(start.points[0].step, limit)))
        if number:
            before = starts[number - 1]
            waiting += max(0.0, start.began_s - (before.began_s + before.elapsed_s))
    phases = {phase: sum(start.parts.get(phase, 0.0) for start in starts) for phase in ("startup", "eval", "save")}
    return Goodput(
        starts=len(starts),
        lost_steps=lost_steps,
        wall_s=waiting + sum(start.elapsed_s for start in starts),
        training_s=training,
        lost_s=lost,
        skipped_s=skipped,
        startup_s=phases["startup"],
        evaluation_s=phases["eval"],
        saving_s=phases["save"],
        closing_s=sum(start.parts.get("close", 0.0) for start in starts),
        waiting_s=waiting,
    )


def _found_all_done(start: Start) -> bool:
    """Whether a start found the run at its end already: the time since then is nobody's."""
    points = start.points
    return bool(points) and start.status == "finished" and points[0].step == points[-1].step
