"""A run that loses a process ends, and says which: heartbeats through a store, beside the main thread.

Once a second or more often every process writes a beat under its rank's key and reads, in one request, the beats it
follows: rank 0 those of all, the others that of rank 0 and what anyone has found. The store serves two small requests
for each process and hands rank 0 a beat of each, some 60 KB a second of 1000 processes. What the first finds, it writes
down, and all say the same.
"""

import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from ..errors import UserError
from .aside import Aside, within
from .hang import HANG, NO_HANG, HangSearch
from .heartbeat import TIMED_OUT, Beat, RollCall, State, name_ranks
from .mesh import World
from .pulse import Pulse, WatchConfig
from .slow import BusyShare, SlowRank, SlowRanks

# Where a launcher keeps a store for the processes it starts, as `host:port`.
WATCH_STORE = "HEADRACE_WATCH_STORE"
PREFIX = "headrace/watch"
VERDICT, NO_VERDICT = "verdict", "-"
# What the errors of collectives say when a peer is gone or does not come; NCCL's are DistErrors, mostly.
PEER_ERRORS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
GRACE_S = 5.0
LOOK_S = 0.05
PART_S = 2.0
# What an end may take: a line on stderr; then the files of a hang; and the last words, which may send an alert for 5 s.
SAY_S, FILES_S, LAST_WORDS_S = 1.0, 3.0, 6.0


class Watch:
    """Heartbeats of this process and an ear on those of the others, from `with` to its end.

    Two threads: one talks with the store, which may block it; the other judges, and ends the process when another is
    missing, since nothing can raise into a main thread that waits in a collective. A process that is alone judges
    nobody, and talks only where a launcher keeps the store, which is to know how far a process came that it lost.

    Args:
        rank: this process.
        size: number of processes.
        timeout_s: silence after which a process is missing; beats are judged a tenth earlier, so that this process
            speaks before the collectives themselves, whose errors name nobody, run out of the same time.
        connect: a new connection to the store; raises RuntimeError or OSError when there is none.
        keeper: who keeps the store; None: rank 0.
        hangs: finds hangs, from what the main thread tells `pulse`; None: nobody looks for them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout_s: float,
        connect: Callable[[], dist.Store],
        keeper: str | None = None,
        hangs: HangSearch | None = None,
    ) -> None:
        self._hangs = hangs
        self.pulse = hangs.pulse if hangs else Pulse()
        # Told why this process ends although nothing was raised in it; not waited for when it takes too long.
        self.last_words: Callable[[str], None] = lambda line: None
        self.interval_s = min(1.0, timeout_s / 10)
        self.grace_s = min(GRACE_S, timeout_s)
        self._rank, self._size, self._connect = rank, size, connect
        self._keeper, self._keeps_store = keeper, keeper is None and rank == 0
        self._host = platform.node()
        self._roll = RollCall(rank, size, 0.9 * timeout_s, self.grace_s, keeper, self._host)
        self._busy, self._slow = BusyShare(self.pulse), SlowRanks()
        self._found_slow: list[SlowRank] = []
        self._lock = threading.Lock()
        self._count = 0
        self._state: State = "runs"
        self._reason = self._found = self._verdict = ""
        self._wake, self._named = threading.Event(), threading.Event()
        self._closing, self._parted, self._stop = threading.Event(), threading.Event(), threading.Event()
        # Taken for good by whoever ends the watch: the end of `with`, or the first to say who is missing.
        self._end = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        works = [self._talk] if self._size > 1 or self._keeper else []
        if self._size > 1:
            works.append(self._judge)
        for work in works:
            self._threads.append(threading.Thread(target=work, name=f"headrace{work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        self._end.acquire()
        if error is not None:
            # An error that all meet ends each of them by itself; nobody needs to be told of it by another.
            self._state = "left" if isinstance(error, UserError) and error.everywhere else "error"
            self._reason = _describe(error)
        else:
            self._state = "left"
        self._part()
        for thread in self._threads:
            thread.join(PART_S)

    def slow_ranks(self) -> list[SlowRank]:
        """The processes found slow since the last time, on rank 0; nobody elsewhere."""
        with self._lock:
            found, self._found_slow = self._found_slow, []
        return found

    def blame(self, error: RuntimeError) -> str | None:
        """Who is missing, when a collective met `error`; None where the error has nothing to do with other processes.

        Waits for the heartbeats to show it, some 15 seconds at most.
        """
        text = str(error)
        if self._size == 1 or not (isinstance(error, dist.DistError) or any(part in text for part in PEER_ERRORS)):
            return None
        timed_out = "timed out" in text.lower() or "timeout" in text.lower()
        with self._lock:
            self._state, self._reason = "failed", TIMED_OUT if timed_out else ""
            self._roll.fail(timed_out)
        self._wake.set()
        if self._named.wait(2 * self.grace_s + 4 * self.interval_s):
            return self._found
        return f"rank {self._rank} ({self._host}) lost touch with the others, who are all heard of: {_describe(error)}"

    def leave(self, line: str) -> NoReturn:
        """Say who is missing and end this process with status 1, without waiting for anything."""
        self._end.acquire()
        self._leave(line)

    def _leave(self, line: str) -> NoReturn:
        """End the process whatever holds out: stderr, the disk, the store."""
        try:
            self._found = line
            with self._lock:
                steps = [step for step in (self.pulse.number, self._roll.step) if step is not None]
            last = f"last finished step {max(steps)}" if steps else "no step was finished yet"
            remedy = "start the run again to go on from its newest checkpoint"
            _say(f"headrace: error: {line}; {last}; {remedy}")
            self._state = "left"
            began, words = time.monotonic(), Aside(lambda: self.last_words(line))
            self._part()
            if self._hangs:
                self._hangs.finish(began + FILES_S - time.monotonic())
            words.wait(began + LAST_WORDS_S - time.monotonic())
        finally:
            os._exit(1)

    def _part(self) -> None:
        """Have the farewell written; who keeps the store stays until the others have had time to read it."""
        self._closing.set()
        self._wake.set()
        self._parted.wait(PART_S)
        if self._keeps_store:
            until = time.monotonic() + 3 * self.interval_s
            while not self._roll.alone and time.monotonic() < until:
                time.sleep(0.02)
        self._stop.set()
        self._wake.set()

    def _talk(self) -> None:
        """The thread that beats and reads, and connects again when the connection breaks."""
        store: dist.Store | None = None
        while not self._stop.is_set():
            closing = self._closing.is_set()
            try:
                if store is None:
                    store = self._connect()
                    self._fill(store)
                self._exchange(store)
                if closing:
                    self._parted.set()
            except (RuntimeError, OSError):
                store = None
            self._wake.wait(0.05 if closing else self.interval_s)
            self._wake.clear()

    def _fill(self, store: dist.Store) -> None:
        """Give every key that is read a value: reading one that has none would wait for it."""
        for rank in self._roll.heard:
            store.compare_set(_key(rank), "", Beat().pack())
        store.compare_set(VERDICT, "", NO_VERDICT)
        store.compare_set(HANG, "", NO_HANG)

    def _exchange(self, store: dist.Store) -> None:
        self._count += 1
        beat = Beat(self._count, self.pulse.number, self._host, self._state, self._reason, self._busy.seconds)
        store.set(_key(self._rank), beat.pack())
        if self._found:
            store.compare_set(VERDICT, NO_VERDICT, self._found)
        *beats, verdict, hang = store.multi_get([*map(_key, self._roll.heard), VERDICT, HANG])
        if self._hangs:
            self._hangs.exchange(store, hang.decode())
        with self._lock:
            self._roll.hear(dict(zip(self._roll.heard, map(Beat.unpack, beats), strict=True)))
            if self._rank == 0:
                told = {rank: (beat.host, beat.seconds) for rank, beat in self._roll.beats.items()}
                self._found_slow += self._slow.compare(told | {0: (self._host, beat.seconds)})
            self._verdict = "" if verdict == NO_VERDICT.encode() else verdict.decode()

    def _judge(self) -> None:
        """The thread that counts how long others have been silent, and ends this process for it."""
        last = time.monotonic()
        while not self._stop.wait(LOOK_S):
            self._busy.look()
            now = time.monotonic()
            if now - last < self.interval_s / 4:
                continue
            # More went by only if this process was stopped itself, and heard nobody for that reason.
            passed = min(now - last, 2 * self.interval_s)
            with self._lock:
                self._roll.pass_time(passed)
                found, beats = self._verdict or self._roll.finding(self._state == "failed"), self._roll.beats
            if not found and self._hangs:
                found = self._hangs.judge(passed, beats, self._keeper or name_ranks({0: beats[0].host}))
            last = now
            if not found or self._closing.is_set():
                continue
            self._found = found
            if self._state == "failed":
                self._named.set()
                return
            if self._end.acquire(blocking=False):
                self._leave(found)


def start_watch(world: World, timeout_s: float, limits: WatchConfig | None = None, folder: Path | None = None) -> Watch:
    """The watch of a process that has joined its group, to be used with `with`.

    Its store is the one the launcher or rank 0 keeps for the group, over a connection of its own. With `limits` it
    looks for hangs, and writes what it finds of them into `folder`.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    keeper, prefix = None, f"{PREFIX}/{world.start}"
    if own := os.environ.get(WATCH_STORE):
        host, _, port = own.rpartition(":")
        prefix = PREFIX  # a new store for every start
    if own or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        keeper = f"the launcher at {host}:{port}"
    wait_s = min(timeout_s, 30.0)

    def connect() -> dist.Store:
        # TCPStore writes pages about a connection it does not get.
        socket.create_connection((host, int(port)), wait_s).close()
        store = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=wait_s)
        )
        return dist.PrefixStore(prefix, store)

    hangs = None
    if limits and limits.margin_s and folder:
        hangs = HangSearch(world.rank, world.size, Pulse(limits), folder, min(GRACE_S, timeout_s))
    return Watch(world.rank, world.size, timeout_s, connect, keeper, hangs)


def last_step(store: dist.Store, size: int) -> int | None:
    """The last step that any of `size` processes has told the store it finished, a second ago or less."""
    watched = dist.PrefixStore(PREFIX, store)
    beats = [Beat.unpack(watched.get(_key(rank))) for rank in range(size) if watched.check([_key(rank)])]
    return max((beat.step for beat in beats if beat.step is not None), default=None)


def _say(line: str) -> None:
    """Write to stderr, after what stdout still holds; either may be closed, full or not read by anyone."""
    within(SAY_S, lambda: sys.stdout.flush(), None)
    within(SAY_S, lambda: print(line, file=sys.stderr, flush=True), None)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError | OSError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
