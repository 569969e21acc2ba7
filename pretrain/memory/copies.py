"""When a run copies its state into memory, and how long copies stay."""

import errno
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...errors import UserError
from ...parallel.comm import do_together
from ..checkpoint.host_copy import HostCopy, available_memory
from ..checkpoint_files.folders import step_name
from ..checkpoint_files.manifest import CheckpointError
from .copy_file import memory_entry, write_copy
from .exchange import Parcel, exchange
from .folder import open_run, place_of, remove_after, remove_copies, remove_keeper, remove_left
from .identity import Identity
from .plan import Moment, peer_shift
from .search import Search

logger = logging.getLogger(__name__)

# How many complete copies stay, and how many after there was no room for another.
KEEP, KEEP_IN_NEED = 2, 1
# As those of `saver`.
GROUP_TIMEOUT_S = 4 * 3600.0
CLOSE_S = 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Kept:
    """What a start found in memory, when it is back in the tensors.

    Attributes:
        step: after which the run goes on.
        extra: of rank 0, as of a checkpoint.
        random_states: of this rank.
        from_peers: the ranks whose copy another rank had kept.
    """

    step: int
    extra: dict[str, Any]
    random_states: dict[str, torch.Tensor]
    from_peers: list[int]


@dataclass
class Job:
    """A copy from its step until it is done.

    Attributes:
        moment: when it was made.
        extra: as of a checkpoint, with the copy's own entry.
        random_states: of this rank.
        failure: why it was not made, and on which rank; empty where it was. The same on all ranks.
        error: a defect.
        blocked_s: seconds for which training stood still.
        background_s: seconds beside training.
    """

    moment: Moment
    extra: Mapping[str, Any]
    random_states: Mapping[str, torch.Tensor]
    failure: str = ""
    error: Exception | None = None
    blocked_s: float = 0.0
    background_s: float = 0.0


class MemoryCopies:
    """Copies of this rank's training state in a RAM file system of its machine and of another's.

    The state is taken to host memory at once; a thread writes it into a file and sends it to the peer, over a gloo
    group of its own, which the main thread uses when the thread is not there. What fails costs the copy and not the
    run. All methods but `poll` and `close` are collective, and all are for the main thread.

    Args:
        folder: `checkpoint.memory_folder`.
        name: of the run's own folder in it, from `copies_name`.
        tensors: from `training_tensors`.
        identity: what a copy is of.
        asynchronous: whether training goes on while a copy is written and sent.

    Attributes:
        kept: what this start found, once `load` has.
        num_bytes: of the tensors in this rank's copy.

    Raises:
        UserError: the folder is not private, or there is no memory for taking the state.
    """

    def __init__(
        self, folder: Path, name: str, tensors: Mapping[str, torch.Tensor], identity: Identity, asynchronous: bool
    ) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._identity, self._asynchronous = identity, asynchronous
        self._run = do_together(lambda: open_run(folder, name))
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
        machines = self._gather(_machine_of(self._run))
        self._here = {rank for rank, machine in enumerate(machines) if machine == machines[self._rank]}
        self._shift = peer_shift(machines)
        setting = "checkpoint.memory_every_steps"
        self._host = do_together(lambda: HostCopy(tensors, len(self._here), (f"{setting} above 0", f"{setting}=0")))
        self.num_bytes = self._host.num_bytes
        self._search = Search(self._run, identity, self._host, self._group)
        self._complete: list[int] = []
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._done: list[Job] = []
        self.kept: Kept | None = None

    def load(self, later_than: int, before: int, rewinds: int) -> Kept | None:
        """Put the newest copies that are there for every rank back into the tensors; see `Search.load`."""
        found = self._search.load(later_than, before, rewinds)
        if found is None:
            return None
        plan, copied = found
        self._host.put_back()
        extra = self._gather(copied.extra if self._rank == 0 else None)[0]
        self._complete = [plan.moment.step]
        self.kept = Kept(plan.moment.step, extra, copied.random_states, plan.from_peers)
        return self.kept

    def take(self, step: int, extra: Mapping[str, Any], random_states: Mapping[str, torch.Tensor]) -> None:
        """Make a copy of this moment; waits for the one before.

        Args:
            step: updates done.
            extra: what a checkpoint of it would hold, with the counters under `progress`.
            random_states: of this rank.
        """
        started = time.perf_counter()
        self.finish()
        moment = Moment(step, self._identity.start, len(extra["progress"]["skipped_rows"]))
        job = Job(moment, {**extra, **memory_entry(self._identity, self._rank, moment)}, random_states)
        self._host.take()
        self._job = job
        self._thread = threading.Thread(target=self._work, args=(job,), name="headrace_memory", daemon=True)
        self._thread.start()
        if not self._asynchronous:
            self.finish()
        job.blocked_s = time.perf_counter() - started

    def poll(self) -> list[Job]:
        """The copies that are done, or were given up, since the last call. Does not wait.

        Raises:
            Exception: a defect.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.finish()
        done, self._done = self._done, []
        return done

    def finish(self) -> None:
        """Wait until no copy is under way.

        Raises:
            Exception: a defect.
        """
        if self._job is None or self._thread is None:
            return
        self._thread.join()
        job, self._job, self._thread = self._job, None, None
        if job.error is not None:
            raise job.error
        self._done.append(job)

    def remove_after(self, step: int) -> None:
        """Remove the copies of steps after `step`, which the run has gone back to.

        Raises:
            UserError: one cannot be removed; on every rank.
        """
        self.finish()
        do_together(lambda: remove_after(self._run, step))
        self._complete = [complete for complete in self._complete if complete <= step]

    def clear(self) -> None:
        """Remove all copies: a checkpoint on the disk has what they have, or the run is done."""
        self.finish()
        if self._rank == min(self._here):
            with suppress(OSError):
                remove_left(self._run, self._here, sys.maxsize)
        remove_keeper(self._run, self._rank)
        self._complete = []

    def close(self, error: BaseException | None) -> None:
        """Let a copy under way end: all of it, unless `error` is that of this process alone. Raises nothing."""
        if self._thread is not None:
            alone = error is not None and not (isinstance(error, UserError) and error.everywhere)
            self._thread.join(CLOSE_S if alone else None)

    def _work(self, job: Job) -> None:
        """What the thread does."""
        started = time.perf_counter()
        try:
            self._host.wait()
            job.failure = self._make(job)
        except RuntimeError as error:  # of the group: the main thread will know more
            job.failure = str(error).partition("\n")[0]
        except Exception as error:
            job.error = error
        job.background_s = time.perf_counter() - started

    def _make(self, job: Job) -> str:
        """Write the copy and exchange it with the peers; why that failed, or nothing. All ranks do alike."""
        step = job.moment.step
        failure = self._together(lambda: self._write(job))
        if not failure and self._shift:
            failure = self._together(lambda: self._exchange(step))
        # Older copies go only when all ranks hold the new one on both machines.
        self._complete = self._complete[-KEEP_IN_NEED:] if failure else [*self._complete, step][-KEEP:]
        try:
            remove_copies(self._run, self._rank, set(self._complete))
            if not failure and self._rank == min(self._here):
                remove_left(self._run, self._here, self._complete[0])
        except OSError as error:
            logger.warning("old copies in %s cannot be removed: %s", self._run, error.strerror)
        return failure

    def _write(self, job: Job) -> None:
        need, free = 2 * self._host.num_bytes * len(self._here), available_memory()
        if free is not None and need > free:
            text = f"{need / 1e6:,.1f} MB are to be kept on this machine, {free / 1e6:,.1f} MB of its memory are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}", str(self._run))
        path = place_of(self._run, self._rank, self._rank) / step_name(job.moment.step)
        write_copy(path, self._rank, self._host.tensors, job.random_states, job.extra)

    def _exchange(self, step: int) -> None:
        """This rank's copy to the rank `shift` further on, and that of the rank `shift` before it to this one."""
        mine, theirs = self._rank, (self._rank - self._shift) % self._size
        name = step_name(step)
        send = Parcel(mine, place_of(self._run, mine, mine) / name, (mine + self._shift) % self._size)
        exchange(send, Parcel(theirs, place_of(self._run, mine, theirs) / name, theirs), self._group)

    def _together(self, action: Callable[[], None]) -> str:
        """What the lowest rank met on which `action` failed, the same on all; empty where it did not."""
        met = ""
        try:
            action()
        except OSError as error:
            met = f"{error.strerror or error} ({error.filename or self._run})"
        except CheckpointError as error:
            met = str(error)
        everyone = self._gather(met)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text), "")

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self._size
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _machine_of(folder: Path) -> tuple[str, str, int, int]:
    """The same on ranks that see the same folder."""
    boot = ""
    with suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    found = folder.stat()
    return platform.node(), boot, found.st_dev, found.st_ino
