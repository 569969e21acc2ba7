"""Saving a checkpoint: all ranks write, one rename makes it visible, or nothing changes."""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..checkpoint_files.folders import latest_checkpoint, step_name, temporary_path
from ..checkpoint_files.manifest import CheckpointDamagedError, CheckpointError, CheckpointWriteError
from .storage import PiecePlanner, PieceWriter


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    *,
    extra: Mapping[str, Any],
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    keep_last: int | None = None,
    staged: Mapping[str, torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves a checkpoint of `step` as `folder/step-NNNNNNNN` and returns its path. Collective over the default group.

    `tensors` has the same names on every rank: DTensors of any layout (equal shards are written once) or plain tensors
    (taken to be equal on all ranks). `extra` is plain JSON, taken from rank 0. `rank_tensors` are this rank's own, such
    as random states; names and shapes may differ by rank. A checkpoint of the same step is replaced. With
    `keep_last` (at least 1), older checkpoints beyond that many are removed after the new one has been read back from
    the disk and verified. Works in one process without a process group.

    A save that goes on beside training needs `staged`, this rank's part of every tensor by name, whose numbers are
    saved in place of those in `tensors`; and `group`, all ranks in a gloo group that nobody else uses.

    Raises `CheckpointError`, the same on every rank, when any rank cannot write: then nothing of the save remains and
    the earlier checkpoints are untouched. It is a `CheckpointWriteError` where the disk is to blame (full, failing, or
    what was written reads back wrong). Raises `ValueError` or `TypeError` for what cannot be stored.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last={keep_last}; it must be at least 1")
    path = Path(folder) / step_name(step)
    rank = dist.get_rank() if dist.is_initialized() else 0
    writer = PieceWriter(path, step, extra=extra, rank_tensors=rank_tensors or {}, rank=rank, keep_last=keep_last)
    try:
        with one_error(f"checkpoint {path} was not saved", CheckpointWriteError), quiet_single_process():
            dcp.save(dict(tensors), storage_writer=writer, planner=PiecePlanner(staged), process_group=group)
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(temporary_path(path), ignore_errors=True)
        if isinstance(error, CheckpointError):
            of_disk = isinstance(error, CheckpointWriteError | CheckpointDamagedError)
            kind = CheckpointWriteError if of_disk else CheckpointError
            raise kind(f"{error}; {_what_is_left(Path(folder))}") from error
        raise
    return path


def _what_is_left(folder: Path) -> str:
    try:
        last = latest_checkpoint(folder)
    except OSError:  # of the disk that has just failed
        return f"what is in {folder} cannot be seen"
    return f"the last checkpoint is {last}" if last else "there is no earlier checkpoint"


@contextmanager
def one_error(what: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Turns DCP's bundle of all ranks' failures into the first one: the same exception on every rank.

    An `OSError` becomes a `kind` that begins with `what`.
    """
    try:
        yield
    except CheckpointException as bundle:
        rank, (error, _) = min(bundle.failures.items(), key=lambda failure: failure[0])
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise kind(f"{what}: {reason} (rank {rank}, {error.filename or 'while writing'})") from bundle
        raise error from bundle


@contextmanager
def quiet_single_process() -> Iterator[None]:
    """Silences DCP's warning that there is no process group: that is a supported way to run."""
    if dist.is_initialized():  # filters belong to all threads
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
