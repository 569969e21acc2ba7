"""When and how a run saves: tried again where the disk fails, and beside training where it may be."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import MachineError, UserError
from ..parallel.comm import do_together
from ..parallel.environment import read_number
from .alerts import Alerts
from .checkpoint import CheckpointError, CheckpointWriteError, HostCopy, save_checkpoint
from .config import CheckpointConfig
from .metrics import Metrics
from .resume import Facts, Progress, Snapshot, take_snapshot
from .save_interval import SaveInterval

# Before the second try to save; each wait is twice as long as the one before it.
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
# A rank may wait for another's disk for so long; that processes are alive is watched elsewhere.
GROUP_TIMEOUT_S = 4 * 3600.0
# An error of one process alone ends it; a save that the others may have left as well gets so much time.
CLOSE_S = 5.0
LOOK_EVERY_S = 0.1


@dataclass
class Job:
    """A save from its step until it is done.

    Attributes:
        snapshot: what is saved beside tensors.
        failures: tries that failed and are not reported yet: number, seconds until the next, reason. Written by the
            thread that saves, read by the main thread.
        attempts: tries until it was done or given up.
        error: what the last try met.
        blocked_s: seconds for which training stood still.
        waited_s: of these, those before the save before it was done.
        background_s: seconds beside training.
    """

    snapshot: Snapshot
    failures: deque[tuple[int, float | None, str]] = field(default_factory=deque)
    attempts: int = 0
    error: Exception | None = None
    blocked_s: float = 0.0
    waited_s: float = 0.0
    background_s: float = 0.0

    def attempt(self, save: Callable[[], object], retries: int, tell: Callable[[], None] | None = None) -> None:
        """Save, again and again where the disk fails, and `tell` of it; all ranks fail alike, so they stay together."""
        while True:
            self.attempts += 1
            try:
                save()
                return
            except CheckpointWriteError as error:
                last = self.attempts > retries
                wait_s = min(FIRST_WAIT_S * 2 ** (self.attempts - 1), LONGEST_WAIT_S)
                self.failures.append((self.attempts, None if last else wait_s, str(error)))
                if tell is not None:
                    tell()
                if last:
                    raise
            time.sleep(wait_s)


class Saver:
    """Saves a run's checkpoints. All methods are collective and are to be called by the main thread.

    With `config.asynchronous` a periodic save copies the tensors to host memory, and a thread hashes and writes them;
    it talks with the other ranks over a gloo group of its own, so that no collective of training can get between. One
    save is under way at a time. Ranks learn of its end in the same step: `poll` exchanges who is done, by a message
    that is waited for a step later.

    Args:
        config: how often to try, and whether beside training.
        folder: the run's `checkpoints/`.
        tensors: what is saved, from `training_tensors`.
        facts: what the run must still be to go on.
        metrics: where saves and failures are reported; on rank 0 only.
        alerts: where failures are told.

    Raises:
        UserError: there is no memory for the copy.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        tensors: Mapping[str, torch.Tensor],
        facts: Facts,
        metrics: Metrics | None,
        alerts: Alerts,
    ) -> None:
        self._config, self._folder, self._tensors, self._facts = config, folder, tensors, facts
        self._metrics, self._alerts = metrics, alerts
        self._failed_in_a_row = 0
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._exchange: tuple[torch.Tensor, dist.Work] | None = None
        self._copy: HostCopy | None = None
        self._interval = None
        if config.time_share and metrics is not None:
            self._interval = SaveInterval(config.time_share, config.failure_every_s)
        if config.asynchronous and config.is_periodic:
            processes_here = read_number("LOCAL_WORLD_SIZE", 1, least=1)
            self._copy = do_together(lambda: HostCopy(tensors, processes_here))
        # For saves that all wait for, too: disks may be slower than collectives of training are allowed to be.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))

    def is_due(self) -> bool:
        """Whether it is time for a periodic save, on the process that reports where time says so; not collective.

        Said once for each: the save comes a step later, when all ranks know.
        """
        if self._interval is None or self._job is not None or not self._interval.is_due():
            return False
        self._interval.begin()
        return True

    def save(self, progress: Progress, must: bool) -> None:
        """Save a checkpoint of this moment.

        Args:
            progress: counters.
            must: it is to be there when this returns; otherwise it may come later, or not if the disk fails.

        Raises:
            UserError: the disk has failed once too often, or for a save that must be; or another error of an earlier
                save that went on beside training.
        """
        started = time.perf_counter()
        self.finish()
        job = Job(take_snapshot(progress, self._facts), waited_s=time.perf_counter() - started)
        if self._interval is not None:
            self._interval.begin()
        if self._copy is not None and not must:
            self._copy.take()
            self._job = job
            self._thread = threading.Thread(
                target=self._write, args=(job, self._copy), name="headrace_save", daemon=True
            )
            self._thread.start()
            job.blocked_s = time.perf_counter() - started
            return
        try:
            job.attempt(lambda: self._save_once(job.snapshot), self._config.retries, lambda: self._report_failures(job))
        except CheckpointError as error:  # the same on all ranks
            job.error = error
        job.blocked_s = time.perf_counter() - started
        self._report(job, must)

    def poll(self) -> None:
        """Learn whether the save under way is done, once a step; does not wait for it.

        Raises:
            UserError: it failed, once too often.
        """
        if self._job is None or self._thread is None:
            return
        self._report_failures(self._job)
        still = int(self._thread.is_alive())
        if dist.get_world_size() > 1:
            before, self._exchange = self._exchange, None
            if before is None or _finish(before):
                flag = torch.tensor([still], dtype=torch.int32)
                work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
                assert work is not None
                self._exchange = flag, work
                return
        elif still:
            return
        self.finish()

    def finish(self) -> None:
        """Wait until no save is under way, and report the one that was.

        Raises:
            UserError: it failed, once too often.
        """
        if self._job is None or self._thread is None:
            return
        job, exchange = self._job, self._exchange
        while self._thread.is_alive():
            self._thread.join(LOOK_EVERY_S)
            self._report_failures(job)
        self._job = self._thread = self._exchange = None
        if exchange is not None:
            _finish(exchange)
        self._report(job, must=False)

    def close(self, error: BaseException | None) -> None:
        """Let a save under way end: all of it, unless `error` is that of this process alone. Raises nothing new."""
        if self._job is None or self._thread is None:
            return
        alone = error is not None and not (isinstance(error, UserError) and error.everywhere)
        self._thread.join(CLOSE_S if alone else None)
        job, done = self._job, not self._thread.is_alive()
        self._job = self._thread = None
        if done:
            with suppress(Exception):  # is on record, and another error is on its way
                self._report(job, must=False)

    def _write(self, job: Job, copy: HostCopy) -> None:
        """What the thread does."""
        started = time.perf_counter()
        try:
            copy.wait()
            job.attempt(lambda: self._save_once(job.snapshot, copy.tensors), self._config.retries)
        except Exception as error:
            job.error = error
        job.background_s = time.perf_counter() - started

    def _save_once(self, snapshot: Snapshot, staged: Mapping[str, torch.Tensor] | None = None) -> None:
        save_checkpoint(
            self._folder,
            snapshot.step,
            self._tensors,
            extra=snapshot.extra,
            rank_tensors=snapshot.random_states,
            keep_last=self._config.keep_last,
            staged=staged,
            group=self._group,
        )

    def _report_failures(self, job: Job) -> None:
        while job.failures:
            attempt, wait_s, reason = job.failures.popleft()
            if self._metrics is not None:
                record: dict[str, Any] = {"step": job.snapshot.step, "attempt": attempt, "wait_s": wait_s}
                self._metrics.save_failed(record | {"reason": reason})
            self._alerts.send("save_failed", job.snapshot.step, reason)

    def _report(self, job: Job, must: bool) -> None:
        """The end of a save, the same on all ranks; raises what is to end the run."""
        self._report_failures(job)
        if job.error is None:
            self._failed_in_a_row = 0
            if self._interval is not None:
                self._interval.add(job.blocked_s - job.waited_s, job.background_s)
            if self._metrics is not None:
                seconds = {key: getattr(job, key) for key in ("blocked_s", "waited_s", "background_s")}
                self._metrics.save({"step": job.snapshot.step, "attempts": job.attempts, **seconds})
            return
        self._failed_in_a_row += 1
        of_disk = isinstance(job.error, CheckpointWriteError)
        limit = self._config.failures_limit
        if of_disk and not must and self._failed_in_a_row < limit:
            if self._metrics is not None:
                self._metrics.unsaved(job.snapshot.step, self._failed_in_a_row, limit)
            return
        if isinstance(job.error, CheckpointError):
            times = f" ({self._failed_in_a_row} saves in a row failed)" if self._failed_in_a_row > 1 else ""
            raise (MachineError if of_disk else UserError)(f"{job.error}{times}", everywhere=True) from job.error
        raise job.error


def _finish(exchange: tuple[torch.Tensor, dist.Work]) -> bool:
    """Whether any rank was still at it when it sent the message."""
    flag, work = exchange
    work.wait()
    return bool(flag)
