"""What benchmarks/soak.py does to a run, and the loop that plays the scheduler around it."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headrace.pretrain.checkpoint_files.folders import list_checkpoints

T = TypeVar("T")
LOOK_S = 0.05
# As a scheduler needs to queue a job again, and no more: a node is there.
QUEUE_S = 1.0
# A run that comes no further for so long would wait for someone for ever.
STUCK_S = 900.0
USER_ERROR = 2
# After so many starts that ended as the user's mistake nothing is started any more.
MISTAKES = 3
# Steps of a start after which the watch knows how long a step takes.
KNOWN_STEPS = 30


@dataclass
class Pending:
    """A fault that no new step has followed yet.

    Attributes:
        number: of the fault, from 1.
        at: when, on the clock `time.monotonic`.
        step: a later one than this is a new step.
        ranks: processes that this fault ends and that live; steps of theirs are not new ones.
    """

    number: int
    at: float
    step: int
    ranks: list[int]


class RunEndedError(Exception):
    """The run was finished, or given up, before a fault found its moment."""


@dataclass
class SoakRun:
    """A run of two processes that is started again whenever its launcher is gone.

    Attributes:
        command: the launcher's.
        folder: the run folder.
        steps: of the whole run.
        out: where the launcher's output and the record of faults go.
        launches: how often the launcher was started.
        interventions: why a person would have had to come.
        is_over: finished or given up.
    """

    command: list[str]
    folder: Path
    steps: int
    out: Path
    launches: int = 0
    interventions: list[str] = field(default_factory=list)
    is_over: bool = False
    furthest: int = 0
    grown: int = 0
    faults: int = 0
    damaged: list[str] = field(default_factory=list)
    _launcher: subprocess.Popen[bytes] | None = None
    _ranks: list[int] = field(default_factory=list)
    _last: int = 0
    _new_at: float = field(default_factory=time.monotonic)
    _ended_at: float = -QUEUE_S
    _pending: list[Pending] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def launcher(self) -> int | None:
        """The launcher's process id, while it lives."""
        return self._launcher.pid if self._launcher is not None and self._launcher.poll() is None else None

    def ranks(self) -> list[int]:
        """Process ids of the ranks of this launcher that live, by rank."""
        if (pid := self.launcher) is None:
            return []
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children if is_alive(int(child))]

    def both_ranks(self) -> list[int]:
        """`ranks`, once both are there."""
        found = self.ranks()
        return found if len(found) == 2 else []

    def tend(self) -> None:
        """Start what has ended, and take note of new steps."""
        if self._launcher is not None and (status := self._launcher.poll()) is not None:
            self._launcher, self._ended_at = None, time.monotonic()
            self._judge(status)
        gone = self._launcher is None and not any(map(is_alive, self._ranks))
        if gone and not self.is_over and time.monotonic() - self._ended_at >= QUEUE_S:
            with (self.out / "launcher.log").open("ab") as log:
                self._launcher = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment())
            self.launches += 1
        self._look()

    def _judge(self, status: int) -> None:
        """What the end of a launcher means to a scheduler."""
        if status == 0 and last_step(self.folder) >= self.steps:
            self.is_over = True
        if status == USER_ERROR:
            said = (self.out / "launcher.log").read_text(errors="replace").splitlines()[-1:]
            self.interventions.append(" ".join(said))
            self.record({"kind": "user error", "said": said})
            self.is_over = len(self.interventions) >= MISTAKES

    def _look(self) -> None:
        # Who lives is asked first: what the dead have written is on record by then.
        alive = {rank for entry in self._pending for rank in entry.ranks if is_alive(rank)}
        now, step, ranks = time.monotonic(), last_step(self.folder), self.ranks()
        if ranks != self._ranks and ranks:
            self._ranks, self.grown = ranks, 0
        elif step > self._last:
            self.grown += step - self._last
        self._last = step
        if step > self.furthest:
            self.furthest, self._new_at = step, now
        elif now - self._new_at > STUCK_S and not self.is_over:
            self.interventions.append(f"no new step for {STUCK_S:.0f} s")
            self.is_over = True
        for entry in list(self._pending):
            if entry.ranks:
                entry.step = max(entry.step, self.furthest)
                entry.ranks = [rank for rank in entry.ranks if rank in alive]
            elif self.furthest > entry.step:
                self._pending.remove(entry)
                self.record({"kind": "new step", "fault": entry.number, "seconds": round(now - entry.at, 2)})

    def note(self, kind: str, ends: list[int] | None, **facts: Any) -> None:
        """A fault happens now, which will end the processes `ends`, if any are there; None: it ends none."""
        self._look()
        self.faults += 1
        # One step may be under way, and one be done and not yet seen.
        step = self.furthest + 2 if ends is None else self.furthest
        self._pending.append(Pending(self.faults, time.monotonic(), step, ends or []))
        self.record({"kind": kind, "fault": self.faults, "step": self.furthest, **facts})

    def record(self, facts: dict[str, Any]) -> None:
        """A line in faults.jsonl."""
        with (self.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 2), **facts}) + "\n")

    def wait_for(self, found: Callable[[], T], every_s: float = LOOK_S) -> T:
        """What `found` returns once it is true, looked at every so many seconds.

        Raises:
            RunEndedError: the run is over before.
        """
        while not (result := found()):
            if self.is_over:
                raise RunEndedError
            self.tend()
            time.sleep(every_s)
        return result

    def spend(self, seconds: float) -> None:
        """Let time go by."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.is_over:
            self.tend()
            time.sleep(LOOK_S)

    def close(self) -> None:
        """End what still runs."""
        cut_power(self)
        if self._launcher is not None:
            self._launcher.wait()


def environment() -> dict[str, str]:
    """Of every launcher: a thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill(*pids: int) -> None:
    """kill -9; they are gone afterwards."""
    for pid in pids:
        send(pid, signal.SIGKILL)
    while any(map(is_alive, pids)):
        time.sleep(0.002)


def last_step(folder: Path) -> int:
    """The last step on record; 0 where there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError):
            record = json.loads(line)
            if record.get("kind") == "train":
                return record["step"]
    return 0


def kill_rank(run: SoakRun, draw: random.Random) -> None:
    """Its launcher starts both again."""
    ranks = run.wait_for(run.both_ranks)
    victim = draw.randrange(2)
    run.note("kill_rank", ranks, rank=victim)
    kill(ranks[victim])


def cut_power(run: SoakRun) -> None:
    """kill -9 of everything, the launcher first."""
    ranks = run.ranks()
    kill(*([run.launcher] if run.launcher else []), *ranks)


def power_cut(run: SoakRun, draw: random.Random) -> None:
    """At any moment, half in a start too."""
    run.wait_for(lambda: run.launcher)
    run.note("power_cut", run.ranks())
    cut_power(run)


def preemption(run: SoakRun, draw: random.Random) -> None:
    """The run saves, and is started again."""
    pid = run.wait_for(lambda: run.launcher)
    run.note("preemption", run.ranks())
    send(pid, signal.SIGTERM)


def hang(run: SoakRun, draw: random.Random) -> None:
    """Once the watch knows what a step takes; the page that names the rank tells who found it."""
    ranks = run.wait_for(lambda: run.both_ranks() if run.grown >= KNOWN_STEPS else [])
    victim = draw.randrange(2)
    run.note("hang", ranks, rank=victim)
    send(ranks[victim], signal.SIGSTOP)


def pause(run: SoakRun, draw: random.Random) -> None:
    """Shorter than a hang."""
    ranks = run.wait_for(run.both_ranks)
    victim, seconds = ranks[draw.randrange(2)], draw.uniform(0.5, 3.0)
    run.note("pause", None, seconds_stopped=round(seconds, 2))
    send(victim, signal.SIGSTOP)
    run.spend(seconds)
    send(victim, signal.SIGCONT)


def kill_in_save(run: SoakRun, draw: random.Random) -> None:
    """While the hidden folder of a checkpoint is there: one rank, or everything."""
    run.wait_for(lambda: run.both_ranks() and list(run.checkpoints.glob(".tmp-step-*")), every_s=0.001)
    time.sleep(draw.uniform(0.0, 0.02))
    ranks = run.ranks()
    run.note("kill_in_save", ranks)
    if ranks and draw.random() < 0.5:
        kill(draw.choice(ranks))
    else:
        cut_power(run)


def newest_of_two(run: SoakRun) -> Path | None:
    """The newest checkpoint, where there is one before it that nothing was done to: nobody survives the loss of all."""
    found = [path for path in list_checkpoints(run.checkpoints) if path.name not in run.damaged]
    everything = list_checkpoints(run.checkpoints)
    return found[-1] if len(found) >= 2 and everything[-1] == found[-1] else None


def damage(run: SoakRun, draw: random.Random, kind: str, harm: Callable[[Path, random.Random], None]) -> None:
    """Harm a file of the newest checkpoint, and cut the power."""
    path = run.wait_for(lambda: newest_of_two(run))
    files = sorted(path.iterdir()) if kind != "missing" else sorted(path.glob("rank-*"))
    victim = draw.choice(files)
    run.note(kind, run.ranks(), file=f"{path.name}/{victim.name}")
    run.damaged.append(path.name)
    with suppress(FileNotFoundError):  # a save that went on has just removed it
        harm(victim, draw)
    cut_power(run)


def flip_byte(file: Path, draw: random.Random) -> None:
    """Change one byte."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    file.write_bytes(data)


def cut_file(file: Path, draw: random.Random) -> None:
    """Leave the beginning."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def full_disk(run: SoakRun, draw: random.Random) -> None:
    """For less time than a save is tried for."""
    run.wait_for(lambda: run.both_ranks() if run.grown else [])
    seconds = draw.uniform(3.0, 6.0)
    filler = run.checkpoints / "filler"
    run.note("full_disk", None, seconds_full=round(seconds, 2))
    try:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        run.spend(seconds)
    finally:
        filler.unlink(missing_ok=True)


def ask(name: str, ends: bool) -> Callable[[SoakRun, random.Random], None]:
    """A fault that is a file in the run folder."""

    def fault(run: SoakRun, draw: random.Random) -> None:
        ranks = run.wait_for(run.both_ranks)
        run.note(name, ranks if ends else None)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / name).touch()

    return fault


# By kind: in words, and how it is done.
FAULTS: dict[str, tuple[str, Callable[[SoakRun, random.Random], None]]] = {
    "kill_rank": ("kill -9 of a rank", kill_rank),
    "power_cut": ("kill -9 of launcher and ranks", power_cut),
    "preemption": ("SIGTERM to the launcher", preemption),
    "hang": ("SIGSTOP of a rank, for ever", hang),
    "pause": ("SIGSTOP of a rank for 0.5-3 s", pause),
    "kill_in_save": ("kill -9 in the middle of a save", kill_in_save),
    "flip": ("a byte of the newest checkpoint changed, kill -9", lambda r, d: damage(r, d, "flip", flip_byte)),
    "cut": ("a file of the newest checkpoint cut, kill -9", lambda r, d: damage(r, d, "cut", cut_file)),
    "missing": (
        "a piece of the newest checkpoint removed, kill -9",
        lambda r, d: damage(r, d, "missing", lambda file, _: file.unlink()),
    ),
    "full_disk": ("the checkpoints' disk full for 3-6 s", full_disk),
    "STOP": ("the file STOP", ask("STOP", ends=True)),
    "CHECKPOINT_NOW": ("the file CHECKPOINT_NOW", ask("CHECKPOINT_NOW", ends=False)),
}


def launch_command(config: Path, overrides: list[str]) -> list[str]:
    """The launcher of a run of two processes."""
    return [sys.executable, "-m", "headrace", "train", str(config), *overrides, "--nproc", "2", "--restarts", "3"]
