"""Batches for one rank, read ahead by a background thread."""

import queue
import threading
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from .rows import TokenRows
from .skipped import SkippedRows


@dataclass(frozen=True)
class Batch:
    """Rows of one rank: `tokens_BL`, `targets_BL` (int64, -100 where ignored) and `reset_BL` (bool), on the CPU.

    `first_row` is the global number of the first row of the batch of all ranks. Pinned where CUDA is there.
    """

    tokens_BL: torch.Tensor
    targets_BL: torch.Tensor
    reset_BL: torch.Tensor
    first_row: int


class BatchLoader:
    """Endless iterator over the batches of one rank, `batch_rows` rows each.

    With k the first row of a batch of all ranks, rank r gets rows [k + r n, k + (r+1) n), n = `batch_rows`, and the
    next batch starts at k + n `world_size`, or behind `skipped` rows that begin there. The rows of all ranks together
    do not depend on how many there are. `next_row` is the whole state: a loader made with `start=next_row` continues
    exactly. `prefetch` batches are kept ready. What fails in the thread is raised by `next()`. Close it, or use it in
    a `with` statement.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        prefetch: int = 4,
        skipped: SkippedRows | None = None,
    ) -> None:
        if batch_rows < 1 or not 0 <= rank < world_size or start < 0 or prefetch < 1:
            raise ValueError(f"{batch_rows=} {rank=} {world_size=} {start=} {prefetch=} do not fit together")
        self.rows = rows
        self.batch_rows = batch_rows
        self.rank = rank
        self.step_rows = batch_rows * world_size
        self.skipped = skipped or SkippedRows()
        self.next_row = self.skipped.following(start)
        self._pin = torch.cuda.is_available()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self.next_row,), name="batch-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch; raises what its reading raised, and RuntimeError after `close`."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.next_row = self._after(item.first_row)
        return item

    def close(self) -> None:
        """Stops the thread and waits for it; closing twice is harmless."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, first_row: int) -> None:
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self._read(first_row)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            first_row = self._after(first_row)

    def _after(self, first_row: int) -> int:
        return self.skipped.following(first_row + self.step_rows)

    def _read(self, first_row: int) -> Batch:
        begin = first_row + self.rank * self.batch_rows
        rows = [self.rows.row(k) for k in range(begin, begin + self.batch_rows)]
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
        tokens_BL, targets_BL, reset_BL = [column.pin_memory() if self._pin else column for column in columns]
        return Batch(tokens_BL, targets_BL, reset_BL, first_row)
