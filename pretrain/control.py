"""What is asked of a run while it goes, by files in its folder and by signals, and how all processes agree on it."""

import os
import signal
import threading
import time
from contextlib import suppress
from enum import IntFlag
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

# Looking for files asks the file system, which may be far away.
LOOK_EVERY_S = 1.0


class Wish(IntFlag):
    """What may be asked."""

    SAVE = 1
    EVALUATE = 2
    STOP = 4
    SIGTERM = 8
    SIGUSR1 = 16
    PROFILE = 32
    PERIODIC_SAVE = 64
    SIGHUP = 128

    @property
    def stops(self) -> bool:
        """Whether the run is to save and stop."""
        return bool(self & (Wish.STOP | Wish.SIGTERM | Wish.SIGUSR1 | Wish.SIGHUP))

    @property
    def saves(self) -> bool:
        """Whether a checkpoint of this step is wanted."""
        return bool(self & (Wish.SAVE | Wish.PERIODIC_SAVE))

    @property
    def reason(self) -> str:
        """Why it stops, in words."""
        words = {wish: number.name for number, wish in SIGNALS.items()} | {Wish.STOP: "the file STOP"}
        return " and ".join(text for wish, text in words.items() if self & wish)


STOP = "STOP"
FILES = {"CHECKPOINT_NOW": Wish.SAVE, "EVAL_NOW": Wish.EVALUATE, "PROFILE": Wish.PROFILE, STOP: Wish.STOP}
SIGNALS = {signal.SIGTERM: Wish.SIGTERM, signal.SIGUSR1: Wish.SIGUSR1, signal.SIGHUP: Wish.SIGHUP}


class Control:
    """Listens from `with` to its end; signals go to any process, files to the run folder.

    What one process hears in a step all of them know in the next: the exchange goes on beside the step, on the CPU, and
    nothing waits for a device.

    Args:
        folder: the run folder, on the process that looks for files; None on the others.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._heard: list[Wish] = []  # a signal may come between any two instructions: only appended to and popped
        self._looked = -LOOK_EVERY_S
        self._before: dict[signal.Signals, Any] = {}
        self._under_way: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "Control":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Another process failed, and the launcher, which knows which, waits for this one to end.
        if isinstance(error, RuntimeError) and Wish.SIGTERM in self._heard:
            signal.raise_signal(signal.SIGTERM)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._heard.append(SIGNALS[signal.Signals(number)])

    def _look(self) -> None:
        if self._folder is None or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        with suppress(OSError):  # of the file system; the next look may see more
            for name in os.listdir(self._folder):
                if name in FILES:
                    self._heard.append(FILES[name])
                    if name != STOP:  # that stays until it is done, also where a save fails or the run crashes
                        (self._folder / name).unlink(missing_ok=True)

    def ask(self, wish: Wish) -> None:
        """As if it had been heard from outside."""
        self._heard.append(wish)

    def agreed(self) -> Wish:
        """What any process had heard in the step before; the same on all. Collective, once a step."""
        found = self._finish()
        self._look()
        mine = Wish(0)
        while self._heard:
            mine |= self._heard.pop()
        if dist.get_world_size() == 1:
            return mine
        wish = torch.tensor([int(mine)], dtype=torch.int32)
        work = dist.all_reduce(wish, op=dist.ReduceOp.BOR, async_op=True)
        assert work is not None
        self._under_way = wish, work
        return found

    def _finish(self) -> Wish:
        if self._under_way is None:
            return Wish(0)
        (wish, work), self._under_way = self._under_way, None
        work.wait()
        return Wish(int(wish))
