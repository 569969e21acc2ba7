"""What is written down of a run that hangs: where every process stands, and which one did not come."""

import faulthandler
import gc
import json
import linecache
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from .heartbeat import Beat, RollCall, name_ranks
from .pulse import Pulse

# Whoever finds the run hung asks all, by its rank, to say where they stand.
HANG, NO_HANG = "hang", "-"
INNERMOST = 8
_LOOKS = threading.Lock()
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
    """

    step: int | None
    doing: str
    waits: bool
    lines: tuple[str, ...]
    trace: str

    def pack(self) -> str:
        """The text that `unpack` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def unpack(text: bytes) -> "Stand":
        """What `pack` wrote."""
        found = json.loads(text)
        return Stand(**{**found, "lines": tuple(found["lines"])})


def take_stand(folder: Path, rank: int, step: int | None, doing: str) -> Stand:
    """Where this process stands; the stacks of all its threads go to `hang-rank-N.txt` in `folder`.

    Python runs while the main thread waits in a collective or for a device; where it does not, nobody answers.
    """
    path = folder / f"hang-rank-{rank}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            print(f"rank {rank}, process {os.getpid()}, last finished step {step}, in: {doing}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        trace = dump_trace(folder, rank)
    except OSError as error:
        trace = f"{path} cannot be written: {error.strerror}"
    lines, waits = main_thread()
    return Stand(step, doing, waits, lines, trace)


def dump_trace(folder: Path, rank: int) -> str:
    """Write what PyTorch's flight recorder holds of the last collectives, as JSON; says what came of it."""
    if "nccl" not in str(dist.get_backend_config() if dist.is_initialized() else ""):
        return "gloo keeps no flight recorder"
    # Renamed in torch 2.13.
    dump = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return "this torch has no flight recorder"
    path = folder / f"hang-rank-{rank}-collectives.json"
    found = dump()
    path.write_bytes(found if isinstance(found, bytes) else found.encode())
    return path.name


def main_thread() -> tuple[tuple[str, ...], bool]:
    """Where the main thread is, innermost line first, and whether it waits for others there."""
    frame = _main_frame()
    lines: list[str] = []
    waits = False
    while frame is not None and len(lines) < INNERMOST:
        code, number = frame.f_code, _line(frame)
        source = linecache.getline(code.co_filename, number).strip()
        waits |= not lines and _waits(code.co_filename, number)
        lines.append(f"{code.co_filename}:{number} in {code.co_name}: {source}")
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
    return COLLECTIVES in file or ".wait(" in linecache.getline(file, line)


def find_missing(size: int, stands: Mapping[int, Stand]) -> tuple[list[int], str]:
    """Who did not come to where the others wait, and what speaks for it; nobody where nothing does.

    Those that do not answer; else those that are steps behind; else the few whose main thread waits for nobody.
    """
    if silent := [rank for rank in range(size) if rank not in stands]:
        return silent, "does not answer" if len(silent) == 1 else "do not answer"
    steps = {rank: -1 if stand.step is None else stand.step for rank, stand in stands.items()}
    if behind := [rank for rank, step in steps.items() if step < max(steps.values())]:
        return behind, f"did not come to step {max(steps.values()) + 1}, where the others wait,"
    busy = [rank for rank, stand in stands.items() if not stand.waits]
    if busy and 2 * len(busy) <= size:
        return busy, f"did not come to where the others wait in step {max(steps.values()) + 1},"
    return [], ""


def describe(size: int, stands: Mapping[int, Stand], hosts: Mapping[int, str], idle_s: float) -> str:
    """The beginning of a sentence that names the missing."""
    missing, what = find_missing(size, stands)
    stood = f"no step was finished for {idle_s:.0f} s"
    if not missing:
        return f"{stood}, and no rank stands out"
    named = f"{name_ranks({rank: hosts.get(rank, 'host unknown') for rank in missing})} {what}"
    if (stand := stands.get(missing[0])) and stand.lines:
        where = "stands" if len(missing) == 1 else f"rank {missing[0]} stands"
        return f"{named} and {where} at {stand.lines[0]}; {stood}"
    return f"{named}; {stood}"


def page(line: str, limit_s: float, size: int, stands: Mapping[int, Stand], beats: Mapping[int, Beat]) -> str:
    """The text of `hang.txt`: who is missing, and where every process stands."""
    text = [f"{line} (allowed: {limit_s:.1f} s).", ""]
    for rank in range(size):
        stand, beat = stands.get(rank), beats.get(rank, Beat())
        if stand is None:
            text += [f"rank {rank} ({beat.host}): does not answer; last heard of after step {beat.step}", ""]
            continue
        waits = "waits for others" if stand.waits else "waits for no other that Python shows"
        text += [f"rank {rank} ({beat.host}): finished step {stand.step}, in: {stand.doing}; {waits}; {stand.trace}"]
        text += [*(f"    {where}" for where in stand.lines), ""]
    return "\n".join(text)


class HangSearch:
    """Finds that this process has not come on for longer than steps take, asks all where they stand, writes it down.

    Driven by the two threads of a `Watch`: `judge` by the one that ends the process, `exchange` by the one that talks
    with the store. Rank 0 asks; the others wait for it for twice the grace before they do.

    Args:
        rank: this process.
        size: number of processes.
        pulse: what the main thread tells.
        folder: where stacks and the page go.
        grace_s: how long an answer is waited for.
    """

    def __init__(self, rank: int, size: int, pulse: Pulse, folder: Path, grace_s: float) -> None:
        self.pulse = pulse
        self._rank, self._size, self._folder, self._grace_s = rank, size, folder, grace_s
        self._asks = self._told = False
        self._asked_for_s = 0.0
        self._limit_s = self._idle_s = 0.0
        self._stands: dict[int, Stand] = {}

    def judge(self, seconds: float, roll: RollCall) -> str:
        """Let time go by; who is missing, as the beginning of a sentence, once it is known and written down."""
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
        stands, beats = dict(self._stands), roll.beats
        line = describe(self._size, stands, {rank: beat.host for rank, beat in beats.items()}, self.pulse.idle_s)
        path = self._folder / "hang.txt"
        try:
            replace(path, page(line, self._limit_s, self._size, stands, beats))
        except OSError as error:
            return f"{line} ({path} cannot be written: {error.strerror})"
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
            self._told = True
            self._take_stand()
            store.set(f"stand/{self._rank}", self._stands[self._rank].pack())
        if self._asks:
            for rank in range(self._size):
                if rank not in self._stands and store.check([f"stand/{rank}"]):
                    self._stands[rank] = Stand.unpack(store.get(f"stand/{rank}"))

    def _take_stand(self) -> None:
        if self._rank not in self._stands:
            self._stands[self._rank] = take_stand(self._folder, self._rank, self.pulse.number, self.pulse.doing)


def replace(path: Path, text: str) -> None:
    """Write a page whole or not at all; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    aside.write_text(text)
    aside.replace(path)
