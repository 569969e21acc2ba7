"""What is written down of a run that hangs: where every process stands, and which one did not come."""

import faulthandler
import gc
import json
import linecache
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from .aside import Aside, within
from .heartbeat import Beat, name_ranks
from .pulse import Pulse
from .recorder import Reached, find_behind, last_collectives, read_recorder

# Whoever finds the run hung asks all, by its rank, to say where they stand.
HANG, NO_HANG = "hang", "-"
INNERMOST = 8
# How long a file of source, and the flight recorder, are waited for.
SOURCE_S, RECORDER_S = 0.25, 1.0
_LOOKS = threading.Lock()
_SOURCES: dict[str, list[str]] = {}
COLLECTIVES = os.sep + os.path.join("torch", "distributed") + os.sep


@dataclass(frozen=True)
class Stand:
    """Where a process stands, in its own words.

    Attributes:
        step: the last step it finished.
        doing: the step, a record, an evaluation, a save.
        waits: whether its main thread waits for other processes, as far as Python shows it.
        lines: where its main thread is, innermost first.
        trace: what became of the flight recorder of collectives.
        reached: the last collective of each group, from the flight recorder.
    """

    step: int | None
    doing: str
    waits: bool
    lines: tuple[str, ...]
    trace: str
    reached: tuple[Reached, ...] = ()

    def pack(self) -> str:
        """The text that `unpack` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def unpack(text: bytes) -> "Stand":
        """What `pack` wrote."""
        found = json.loads(text)
        reached = tuple(Reached(**one) for one in found["reached"])
        return Stand(**{**found, "lines": tuple(found["lines"]), "reached": reached})


def take_stand(folder: Path, rank: int, step: int | None, doing: str) -> tuple[Stand, dict[Path, bytes]]:
    """Where this process stands, and the files of `folder` that are to tell more; waits for no disk and no device.

    Python runs while the main thread waits in a collective or for a device; where it does not, nobody answers.
    """
    lines, waits = main_thread()
    head = f"rank {rank}, process {os.getpid()}, last finished step {step}, in: {doing}\n"
    files = {folder / f"hang-rank-{rank}.txt": head.encode() + stacks()}
    trace, recording, reached = "gloo keeps no flight recorder", b"", tuple[Reached, ...]()
    if "nccl" in str(dist.get_backend_config() if dist.is_initialized() else ""):
        trace = "the flight recorder tells nothing"
        recording, reached = within(RECORDER_S, _read_recorder, (recording, reached))
    if recording:
        path = folder / f"hang-rank-{rank}-collectives.json"
        files[path], trace = recording, path.name
    return Stand(step, doing, waits, lines, trace, reached), files


def _read_recorder() -> tuple[bytes, tuple[Reached, ...]]:
    recording = read_recorder()
    return recording, last_collectives(recording)


def stacks() -> bytes:
    """The stacks of all threads. No other thread runs while they are written, so that they go to memory first."""
    try:
        memory = os.memfd_create("headrace-stacks") if sys.platform == "linux" else None
        with tempfile.TemporaryFile() if memory is None else open(memory, "w+b") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"no stacks: {error.strerror}\n".encode()


def main_thread() -> tuple[tuple[str, ...], bool]:
    """Where the main thread is, innermost line first, and whether it waits for others there."""
    frame = _main_frame()
    lines: list[str] = []
    waits = False
    while frame is not None and len(lines) < INNERMOST:
        code, number = frame.f_code, _line(frame)
        waits |= not lines and _waits(code.co_filename, number)
        lines.append(f"{code.co_filename}:{number} in {code.co_name}: {_source(code.co_filename, number)}")
        frame = frame.f_back
    return tuple(lines), waits


def waits_now() -> bool:
    """Whether the main thread waits for other processes at this moment, as far as Python shows it."""
    frame = _main_frame()
    return frame is not None and _waits(frame.f_code.co_filename, _line(frame))


def _main_frame() -> FrameType | None:
    """Where the main thread is.

    CPython 3.11 keeps its list of threads locked meanwhile (issue 106883): a collection that runs a finalizer there,
    and with it another thread, which begins or ends, would stop the process for ever.
    """
    with _LOOKS:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(threading.main_thread().ident or 0)
        finally:
            if collects:
                gc.enable()


def _line(frame: FrameType) -> int:
    """Where a frame is; 0 while it is at an instruction that belongs to no line, whose number is None."""
    return frame.f_lineno or 0


def _waits(file: str, line: int) -> bool:
    return COLLECTIVES in file or ".wait(" in _source(file, line)


def _source(file: str, line: int) -> str:
    """A line of source; empty where there is none, and as long as the file system does not give it."""
    if file not in _SOURCES:
        _SOURCES[file] = []
        Aside(partial(_read_source, file)).wait(SOURCE_S)
    lines = _SOURCES[file]
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def _read_source(file: str) -> None:
    _SOURCES[file] = linecache.getlines(file)


def find_missing(size: int, stands: Mapping[int, Stand]) -> tuple[list[int], str]:
    """Who did not come to where the others wait, and what speaks for it; nobody where nothing does.

    Those that do not answer; else those that are steps behind; else those that are behind in a collective of NCCL; else
    the few whose main thread waits for nobody.
    """
    if silent := [rank for rank in range(size) if rank not in stands]:
        return silent, "does not answer" if len(silent) == 1 else "do not answer"
    steps = {rank: -1 if stand.step is None else stand.step for rank, stand in stands.items()}
    if behind := [rank for rank, step in steps.items() if step < max(steps.values())]:
        return behind, f"did not come to step {max(steps.values()) + 1}, where the others wait,"
    behind, what = find_behind({rank: stand.reached for rank, stand in stands.items()})
    if behind:
        return behind, what
    busy = [rank for rank, stand in stands.items() if not stand.waits]
    if busy and 2 * len(busy) <= size:
        return busy, f"did not come to where the others wait in step {max(steps.values()) + 1},"
    return [], ""


def describe(size: int, stands: Mapping[int, Stand], hosts: Mapping[int, str], idle_s: float) -> str:
    """The beginning of a sentence that names the missing."""
    missing, what = find_missing(size, stands)
    stood = _stood(idle_s)
    if not missing:
        return f"{stood}, and no rank stands out"
    named = f"{name_ranks({rank: hosts.get(rank, 'host unknown') for rank in missing})} {what}"
    if (stand := stands.get(missing[0])) and stand.lines:
        where = "stands" if len(missing) == 1 else f"rank {missing[0]} stands"
        return f"{named} and {where} at {stand.lines[0]}; {stood}"
    return f"{named}; {stood}"


def describe_keeper(keeper: str, idle_s: float) -> str:
    """The same where the store does not answer: nobody can be asked, so that nothing is known of anyone else."""
    return f"{keeper}, which keeps the store, does not answer; {_stood(idle_s)}"


def _stood(idle_s: float) -> str:
    return f"no step was finished for {idle_s:.0f} s"


def page(
    line: str,
    limit_s: float,
    size: int,
    stands: Mapping[int, Stand],
    beats: Mapping[int, Beat],
    silence: str = "does not answer",
) -> str:
    """The text of `hang.txt`: who is missing, and where every process stands, or else `silence`."""
    text = [f"{line} (allowed: {limit_s:.1f} s).", ""]
    for rank in range(size):
        stand, beat = stands.get(rank), beats.get(rank, Beat())
        if stand is None:
            text += [f"rank {rank} ({beat.host}): {silence}; last heard of after step {beat.step}", ""]
            continue
        waits = "waits for others" if stand.waits else "waits for no other that Python shows"
        text += [f"rank {rank} ({beat.host}): finished step {stand.step}, in: {stand.doing}; {waits}; {stand.trace}"]
        text += [*(f"    {where}" for where in (*stand.lines, *stand.reached)), ""]
    return "\n".join(text)


class HangSearch:
    """Finds that this process has not come on for longer than steps take, asks all where they stand, writes it down.

    Driven by the two threads of a `Watch`: `judge` by the one that ends the process, `exchange` by the one that talks
    with the store. Rank 0 asks; the others wait for it for twice the grace before they do. What is known goes through
    the store before it goes to files, which threads of their own write: a file system that hangs stops nobody. Where
    the store has not answered once since, no answer of a process can have come, and who keeps it is missing.

    Args:
        rank: this process.
        size: number of processes.
        pulse: what the main thread tells.
        folder: where stacks and the page go.
        grace_s: how long an answer is waited for; half of it, for the page.
    """

    def __init__(self, rank: int, size: int, pulse: Pulse, folder: Path, grace_s: float) -> None:
        self.pulse = pulse
        self._rank, self._size, self._folder, self._grace_s = rank, size, folder, grace_s
        self._asks = self._told = self._answered = False
        self._asked_for_s = 0.0
        self._limit_s = 0.0
        self._line = ""
        self._stands: dict[int, Stand] = {}
        self._taking = threading.Lock()
        self._writing: list[Aside[None]] = []

    def judge(self, seconds: float, beats: Mapping[int, Beat], keeper: str) -> str:
        """Let time go by; who is missing, as the beginning of a sentence, once it is known and written down.

        Args:
            seconds: that went by.
            beats: what was last heard of each process.
            keeper: who keeps the store.
        """
        self.pulse.pass_time(seconds)
        if not self._asks:
            patience_s = 0.0 if self._rank == 0 else 2 * self._grace_s
            self._limit_s = self.pulse.limit_s
            if self._told or self.pulse.idle_s <= self._limit_s + patience_s:
                return ""
            self._asks = True
            self._take_stand()
        self._asked_for_s += seconds
        if len(self._stands) < self._size and self._asked_for_s < self._grace_s:
            return ""
        self._line = self._line or self._tell(beats, keeper)
        return self._line

    def _tell(self, beats: Mapping[int, Beat], keeper: str) -> str:
        """Write the page, as far as that is possible, and say where it is."""
        stands = dict(self._stands)
        if self._answered:
            silence, hosts = "does not answer", {rank: beat.host for rank, beat in beats.items()}
            line = describe(self._size, stands, hosts, self.pulse.idle_s)
        else:
            silence, line = "cannot be asked", describe_keeper(keeper, self.pulse.idle_s)
        path = self._folder / "hang.txt"
        self._write(path, page(line, self._limit_s, self._size, stands, beats, silence).encode())
        if problem := self._writing[-1].wait(self._grace_s / 2):
            return f"{line} ({path} cannot be written: {problem})"
        return f"{line}; see {path}"

    def exchange(self, store: dist.Store, asked: str) -> None:
        """Ask, answer or hear the answers.

        Args:
            store: where heartbeats go.
            asked: what it holds under the key `HANG`.
        """
        if self._asks and asked == NO_HANG:
            asked = store.compare_set(HANG, NO_HANG, str(self._rank)).decode()
        if asked == NO_HANG:
            return
        if not self._told:
            self._take_stand()
            store.set(f"stand/{self._rank}", self._stands[self._rank].pack())
            self._told = True
        if self._asks:
            for rank in [rank for rank in range(self._size) if rank not in self._stands]:
                there = store.check([f"stand/{rank}"])
                self._answered = True
                if there:
                    self._stands[rank] = Stand.unpack(store.get(f"stand/{rank}"))

    def finish(self, seconds: float) -> None:
        """Give what is still being written so long, for all of it together."""
        until = time.monotonic() + seconds
        for writing in list(self._writing):
            writing.wait(until - time.monotonic())

    def _take_stand(self) -> None:
        with self._taking:
            if self._rank in self._stands:
                return
            stand, files = take_stand(self._folder, self._rank, self.pulse.number, self.pulse.doing)
            self._stands[self._rank] = stand
            for path, content in files.items():
                self._write(path, content)

    def _write(self, path: Path, content: bytes) -> None:
        self._writing.append(Aside(partial(replace, path, content)))


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    aside.write_bytes(content)
    aside.replace(path)
