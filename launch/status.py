"""What a run folder tells at a glance, read without loading torch: `headrace status` and `headrace ls`."""

import fcntl
import json
import os
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pretrain.checkpoint_files.folders import checkpoint_step
from ..pretrain.checkpoint_files.folders import list_checkpoints as checkpoints_in
from ..pretrain.goodput import BOUND, Goodput, is_count, measure_goodput, read_starts
from ..pretrain.run_clock import RUN_ID, STARTS

# The newest records are at the end of a file that may be long.
TAIL_BYTES = 1 << 18
_COUNTS, _FIGURES = ("step", "tokens"), ("loss", "tokens_per_s", "bits_per_byte")


@dataclass(frozen=True)
class RunStatus:
    """A run as its folder shows it; None where nothing is on record yet.

    Attributes:
        state: `running`, `stopped`, `finished` or `not running`.
        detail: which process runs it, or who stopped it.
        step, steps: done, and of the whole run.
        loss: of the last record, nats per token.
        bits_per_byte: of the last held-out evaluation.
        idle_s: seconds since the last record.
        checkpoint: name of the newest.
        run: the run's id, the same over all its starts.
        goodput: what the time since the first start went into.
    """

    name: str
    state: str
    detail: str
    step: int
    steps: int | None
    tokens: int | None
    loss: float | None
    tokens_per_s: float | None
    bits_per_byte: float | None
    idle_s: float | None
    checkpoint: str | None
    run: str | None
    goodput: Goodput | None

    def to_json(self) -> dict[str, Any]:
        """All of it, the goodput with the fraction."""
        return asdict(self) | {"goodput": self.goodput.to_json() if self.goodput else None}


def read_status(folder: Path) -> RunStatus:
    """The status of the run in `folder`; what is damaged there is passed over like what is not there.

    Raises:
        UserError: it is no run folder, or cannot be looked at.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.toml; give runs/NAME")
    last = _last_records(folder / "metrics.jsonl")
    train, evaluation = last.get("train", {}), last.get("eval", {})
    step = max((record.get("step", 0) for record in last.values()), default=0)
    steps = _total_steps(folder / "config.toml")
    owner = _owner(folder / ".lock")
    checkpoints = _checkpoints(folder)
    state, detail = "not running", ""
    if owner:
        state, detail = "running", owner
    elif steps is not None and checkpoints and checkpoint_step(checkpoints[-1]) >= steps:
        state = "finished"  # after the last step there is still an evaluation, and the checkpoint
    elif (stopped := _read_json(folder / "STOPPED")) is not None:
        state, detail = "stopped", f"by {stopped.get('reason', 'an unknown hand')}"
    metrics = folder / "metrics.jsonl"
    return RunStatus(
        name=folder.name,
        state=state,
        detail=detail,
        step=step,
        steps=steps,
        tokens=train.get("tokens"),
        loss=train.get("loss"),
        tokens_per_s=train.get("tokens_per_s"),
        bits_per_byte=evaluation.get("bits_per_byte"),
        idle_s=time.time() - metrics.stat().st_mtime if metrics.exists() else None,
        checkpoint=checkpoints[-1].name if checkpoints else None,
        run=_read_run_id(folder / RUN_ID),
        goodput=measure_goodput(read_starts(folder / STARTS)),
    )


def find_runs(folders: list[str]) -> list[Path]:
    """The run folders that are named, or all in `runs/`.

    Raises:
        UserError: none is named, and there are none.
    """
    if folders:
        return [Path(folder) for folder in folders]
    found = sorted(path.parent for path in Path("runs").glob("*/config.toml"))
    if not found:
        raise UserError("there are no runs in runs/; name a run folder")
    return found


def format_status(found: list[RunStatus], as_json: bool) -> str:
    """A table, one run a line, and of a single run what its time went into; or one JSON object a line."""
    if as_json:
        return "\n".join(json.dumps(status.to_json()) for status in found)
    head = ("run", "state", "step", "loss", "bits/byte", "tokens/s", "last record", "checkpoint", "starts", "goodput")
    rows = [head]
    for status in found:
        state = f"{status.state} {status.detail}".strip()
        step = f"{status.step:,}" + ("" if status.steps is None else f" of {status.steps:,}")
        idle = "-" if status.idle_s is None else f"{_span(status.idle_s)} ago"
        numbers = (
            _number(status.loss, ".4f"),
            _number(status.bits_per_byte, ".4f"),
            _number(status.tokens_per_s, ",.0f"),
        )
        goodput = status.goodput
        share = ("-", "-") if goodput is None else (str(goodput.starts), f"{goodput.fraction:.1%}")
        rows.append((status.name, state, step, *numbers, idle, status.checkpoint or "-", *share))
    table = _table(rows)
    if len(found) == 1 and found[0].goodput is not None:
        table += "\n\n" + _goodput_table(found[0].goodput)
    return table


def _goodput_table(goodput: Goodput) -> str:
    """Every part that is not nothing."""
    since = f"time since the first of {goodput.starts} starts" if goodput.starts > 1 else "time since the start"
    rows = [(since, "s", "share")]
    for words, seconds, share in goodput.rows():
        if seconds:
            if words.startswith("lost") and goodput.lost_steps:
                words += f" ({goodput.lost_steps:,})"
            rows.append((words, f"{seconds:,.1f}", f"{share:.1%}"))
    rows.append(("together", f"{goodput.wall_s:,.1f}", ""))
    return _table(rows)


def list_checkpoints(folder: Path) -> str:
    """A table of the checkpoints of a run: step, bytes on disk, age.

    Raises:
        UserError: it is no run folder, or has no checkpoint.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.toml; give runs/NAME")
    found = _checkpoints(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint; let the run reach its first save")
    rows = [("checkpoint", "MB", "saved")]
    for path in found:
        with suppress(FileNotFoundError):  # a run that goes on has just removed it
            size = sum(entry.stat().st_size for entry in os.scandir(path))
            rows.append((path.name, f"{size / 1e6:,.1f}", f"{_span(time.time() - path.stat().st_mtime)} ago"))
    return _table(rows)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in checkpoints_in(folder / "checkpoints") if (path / "manifest.json").exists()]


def _last_records(metrics: Path) -> dict[str, dict[str, Any]]:
    """The last record of each kind; a half-written line is passed over, and one of another shape."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}") from None
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str) and _fits(record):
            found[record["kind"]] = record
    return found


def _fits(record: dict[str, Any]) -> bool:
    """Whether what is shown of a record is of the right type; a loss that is not finite is on record as null."""
    return all(is_count(record.get(key, 0)) for key in _COUNTS) and all(
        value is None or isinstance(value, float) or (type(value) is int and abs(value) < BOUND)
        for value in map(record.get, _FIGURES)
    )


def _read_run_id(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _total_steps(config: Path) -> int | None:
    try:
        steps = tomllib.loads(config.read_text())["train"]["steps"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return steps if is_count(steps) else None


def _owner(lock: Path) -> str:
    """Who holds the lock of a run folder; empty where nobody does."""
    if not lock.exists():
        return ""
    with lock.open(errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"as {file.read().strip() or 'another process'}"
        except OSError as error:
            raise UserError(f"whether a process holds {lock} cannot be seen: {error.strerror}") from None
    return ""


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _span(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
