"""Checkpoint folders by step: naming, listing, making visible, removing."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from .manifest import CheckpointDamagedError, CheckpointError, read_manifest
from .piece_file import PieceFile

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-([0-9]{8,})")
# Anything with this prefix is unfinished or on its way out: never listed, removed by the next save.
_HIDDEN = ".tmp-"
DAMAGED = "damaged-"


def step_name(step: int) -> str:
    """The folder name of the checkpoint at `step`."""
    return f"step-{step:08d}"


def temporary_path(path: Path) -> Path:
    """Where the checkpoint `path` is written before it is made visible."""
    return path.with_name(_HIDDEN + path.name)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder` by name, oldest step first; empty where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def publish(temporary: Path, path: Path) -> None:
    """Makes a finished checkpoint visible under its name, by one rename, so that it survives a power cut.

    A checkpoint of the same step (of an earlier, abandoned continuation) makes way just before.
    """
    sync_folder(temporary)
    if path.exists():
        remove(path)
    os.rename(temporary, path)
    sync_folder(path.parent)


def prune(path: Path, keep_last: int) -> None:
    """Removes all but the `keep_last` newest checkpoints beside `path`, never `path`; logs what cannot be removed."""
    others = [other for other in list_checkpoints(path.parent) if other != path]
    for old in others[: max(0, len(others) - (keep_last - 1))]:
        try:
            remove(old)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", old, error.strerror or error)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises `OSError` where the disk of `folder` has no room for `num_bytes`."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < num_bytes:  # some network file systems tell nothing
        need = f"{num_bytes / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {need}", str(folder))


def remove(path: Path) -> None:
    """Removes a checkpoint; it disappears from the list at once, before its files go one by one."""
    hidden = path.with_name(f"{_HIDDEN}removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_stale(folder: Path) -> None:
    """Removes what interrupted saves left in `folder`; what cannot be removed (some network disks) stays for now."""
    for path in folder.glob(f"{_HIDDEN}*step-*"):
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", path, error.strerror)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def offering_previous(path: Path) -> Iterator[None]:
    """Adds to a `CheckpointDamagedError` the newest older checkpoint that is whole by manifest, sizes and headers."""
    try:
        yield
    except CheckpointDamagedError as error:
        good = previous_whole(path)
        offer = "there is no older good checkpoint beside it"
        if good:
            offer = f"the previous good checkpoint is {good}: remove {path} to go on from there"
        raise CheckpointDamagedError(error.damage, offer) from error


def previous_whole(path: Path) -> Path | None:
    """The newest checkpoint older than `path` that is whole by manifest, sizes and headers, or None."""
    older = [other for other in list_checkpoints(path.parent) if checkpoint_step(other) < checkpoint_step(path)]
    return next(filter(is_whole, reversed(older)), None)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that it is no longer listed, and returns where it is now. Nothing removes it."""
    for number in count(1):
        aside = path.with_name(f"{DAMAGED}{path.name}" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            break
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


def check_whole(path: Path) -> None:
    """Raises `CheckpointError` unless the checkpoint is whole by manifest, sizes and headers; hashes no tensor."""
    for name, entry in read_manifest(path).files.items():
        PieceFile(path, name, entry).close()


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else 0


def is_whole(path: Path) -> bool:
    """Whether `check_whole` finds nothing."""
    try:
        check_whole(path)
    except CheckpointError:
        return False
    return True
