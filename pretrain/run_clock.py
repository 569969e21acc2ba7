"""Where a run's time goes, kept in `starts.jsonl` so that kill -9 loses seconds of it: written here, read in `goodput`.

The file is only ever appended to. Every start writes a record when it begins, one when training begins, one at each
checkpoint, and heartbeats in between; each holds all the sums of its start, so that the last one says everything.
"""

import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Phase = Literal["startup", "train", "eval", "save", "close"]
STARTS, RUN_ID = "starts.jsonl", "run_id"
# A heartbeat every hundredth of the time a start has gone on, within these bounds.
LEAST_BEAT_S, MOST_BEAT_S = 2.0, 60.0


class RunClock:
    """Shares the time of this start out among its phases; safe to use from several threads.

    Args:
        folder: the run folder, on the process that keeps the record; None on the others, where nothing is written.
        began_s: when this process began, in seconds since 1970.

    Attributes:
        run_id: of the run, made at its first start and kept in its folder; empty where nothing is written.
        start: number of this start, from 1; 0 where nothing is written.
    """

    def __init__(self, folder: Path | None, began_s: float) -> None:
        self.run_id, self.start = "", 0
        self._lock = threading.RLock()
        self._phase: Phase = "startup"
        self._parts: dict[str, float] = {}
        self._opened = self._since = time.monotonic()
        self._before_s = max(0.0, time.time() - began_s)
        self._parts["startup"] = self._before_s
        self._point: dict[str, float] = {}
        self._counted = (0, 0.0)  # steps and seconds of training when skipped updates were last counted
        self._status = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._descriptor: int | None = None
        if folder is None:
            return
        self.run_id = _run_id(folder / RUN_ID)
        self._descriptor, self.start = _open(folder / STARTS)
        facts = {"run": self.run_id, "time": began_s, "process": os.getpid(), "host": platform.node()}
        self._write("start", facts)
        self._thread = threading.Thread(target=self._beat, name="headrace_clock", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The time inside belongs to `phase`, that after it to the phase before."""
        before = self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def begin_training(self, step: int, tokens: int, steps: int) -> None:
        """Start-up is over: the run goes on from `step` of `steps`, with `tokens` behind it."""
        self._enter("train")
        with self._lock:
            self._point = {"step": step, "tokens": tokens, "step_s": 0.0, "skipped_s": 0.0}
            self._counted = (step, 0.0)
            self._write("resume", {"steps": steps})

    def step(self, step: int, tokens: int) -> None:
        """Step `step` is finished, with `tokens` behind it."""
        with self._lock:
            is_first = self._point["step_s"] == 0.0
            self._point |= {"step": step, "tokens": tokens, "step_s": self._sums().get("train", 0.0)}
        if is_first:
            self._write("beat")

    def count_skipped(self, updates: int) -> None:
        """Of the steps since the last call, `updates` were skipped."""
        with self._lock:
            step, seconds = self._counted
            self._counted = int(self._point["step"]), self._point["step_s"]
            steps = self._counted[0] - step
            self._point["skipped_s"] += (self._counted[1] - seconds) * updates / max(1, steps)

    def saved(self) -> None:
        """A checkpoint of the last step is on the disk, or on its way there."""
        self._write("save")

    def tell(self, kind: str, facts: dict[str, Any]) -> None:
        """Append a record of another kind than the clock's own."""
        self._append({"kind": kind, "start": self.start, **facts})

    def set_status(self, status: Literal["finished", "stopped"]) -> None:
        """How the start will have ended, unless an error comes in between; without a call: `error`."""
        self._status = status

    def close(self) -> None:
        """The start ends here."""
        if self._descriptor is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._write("end", {"status": self._status or "error"})
            os.close(self._descriptor)
            self._descriptor = None

    def _enter(self, phase: Phase) -> Phase:
        with self._lock:
            before, self._parts = self._phase, self._sums()
            self._since, self._phase = time.monotonic(), phase
        return before

    def _sums(self) -> dict[str, float]:
        """Seconds in each phase until now."""
        spent = time.monotonic() - self._since
        return self._parts | {self._phase: self._parts.get(self._phase, 0.0) + spent}

    def _beat(self) -> None:
        while True:
            elapsed = time.monotonic() - self._opened
            if self._stop.wait(min(MOST_BEAT_S, max(LEAST_BEAT_S, elapsed / 100))):
                return
            self._write("beat")

    def _write(self, kind: str, facts: dict[str, Any] | None = None) -> None:
        with self._lock:
            parts = {name: round(seconds, 6) for name, seconds in self._sums().items()}
            point = {name: round(value, 6) for name, value in self._point.items()}
            record = {"kind": kind, "start": self.start, **(facts or {}), "phase": self._phase, **point}
            self._append({**record, "parts": parts})

    def _append(self, record: dict[str, Any]) -> None:
        """One line, in one piece; a disk that is full costs the record and not the run."""
        with self._lock:
            if self._descriptor is None:
                return
            try:
                os.write(self._descriptor, (json.dumps(record) + "\n").encode())
            except OSError as error:
                print(f"headrace: warning: {STARTS} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _run_id(path: Path) -> str:
    """What is in the file; where there is none, a new name of twelve hexadecimal digits."""
    if path.exists() and (known := path.read_text(errors="replace").strip()):
        return known
    run_id = secrets.token_hex(6)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(run_id + "\n")
    aside.replace(path)
    return run_id


def _open(path: Path) -> tuple[int, int]:
    """The open file, and the number of the start that is about to be written; a line cut short is ended."""
    text = path.read_bytes() if path.exists() else b""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if text and not text.endswith(b"\n"):
        os.write(descriptor, b"\n")
    return descriptor, 1 + sum(line.startswith(b'{"kind": "start"') for line in text.splitlines())
