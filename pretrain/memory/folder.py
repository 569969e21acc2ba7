"""Where copies lie: in a private folder of each machine, by run, rank that keeps, rank they are of, and step.

    <checkpoint.memory_folder>/<run id>-<hash of the run folder>/rank-<that keeps>/of-rank-<whose>/step-<N>/

The last is a checkpoint folder as `checkpoint_files` knows it, of one file.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...errors import UserError, file_error
from ..checkpoint_files.folders import checkpoint_step, list_checkpoints, remove, remove_stale

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}-[0-9a-f]{8}")
_KEEPER = re.compile(r"rank-([0-9]{5,9})")
_OWNER = re.compile(r"of-rank-([0-9]{5,9})")


def copies_name(run_id: str, run_folder: Path) -> str:
    """What the copies of a run are called. One that was begun as a copy of another's folder has that one's id too."""
    path = os.fsencode(run_folder.resolve())
    return f"{run_id}-{hashlib.blake2b(path, digest_size=4).hexdigest()}"


def open_run(folder: Path, name: str) -> Path:
    """The folder of a run, by its `copies_name`, in the private `folder`; both are made where they are not there.

    Raises:
        UserError: `folder` is of another user, open to others, or cannot be made; or the run's id is no name.
    """
    _check_name(name)
    path = folder / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        check_private(folder)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        words = f"checkpoint.memory_folder={folder} cannot be used: {error.strerror}"
        raise file_error(f"{words}; give a folder in memory (/dev/shm/NAME)", error) from None
    return path


def size_of_run(folder: Path, name: str) -> int:
    """The bytes in the files of a run, by its `copies_name`, on this machine. Other processes may remove some.

    Raises:
        UserError: the run's id is no name.
    """
    _check_name(name)
    size = 0
    for path, _, files in os.walk(folder / name):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(path, file)).st_size
    return size


def check_private(folder: Path) -> None:
    """Raises UserError where `folder` is not this user's or is open to others, OSError where it cannot be looked at."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        where = f"checkpoint.memory_folder={folder}"
        raise UserError(f"{where} is not a folder of this user that is closed to all others; give another one")


def place_of(run: Path, keeper: int, owner: int) -> Path:
    """Where rank `keeper` keeps copies of what rank `owner` holds."""
    return run / f"rank-{keeper:05d}" / f"of-rank-{owner:05d}"


def data_file(owner: int) -> str:
    """The name of the tensors' file in a copy of what rank `owner` holds."""
    return f"rank-{owner:05d}.safetensors"


def find_copies(run: Path) -> Iterator[tuple[int, int, Path]]:
    """(rank that keeps, rank it is of, folder) of every copy of the run on this machine, whole or not."""
    for keeper, owner, place in _places(run):
        for path in list_checkpoints(place):
            yield keeper, owner, path


def remove_copies(run: Path, keeper: int, keep: set[int]) -> None:
    """Remove what rank `keeper` keeps but the copies of the steps in `keep`, and what interrupted ones left.

    Raises:
        OSError: one cannot be removed.
    """
    for found, _, place in _places(run):
        if found == keeper:
            remove_stale(place)
            for path in list_checkpoints(place):
                if checkpoint_step(path) not in keep:
                    remove(path)


def remove_after(run: Path, step: int) -> None:
    """Remove all copies of steps after `step`, the newest first. Other processes of this machine may do the same.

    Raises:
        OSError: one cannot be removed.
    """
    found = [path for _, _, path in find_copies(run) if checkpoint_step(path) > step]
    for path in sorted(found, key=checkpoint_step, reverse=True):
        _remove_with_others(path)


def remove_left(run: Path, keepers: set[int], before: int) -> None:
    """Remove copies of steps before `before` that ranks outside `keepers` left on this machine in an earlier start.

    Raises:
        OSError: one cannot be removed.
    """
    for keeper, _, path in find_copies(run):
        if keeper not in keepers and checkpoint_step(path) < before:
            _remove_with_others(path)


def remove_keeper(run: Path, keeper: int) -> None:
    """Remove all that rank `keeper` keeps on this machine, and the run's folder with the last."""
    shutil.rmtree(run / f"rank-{keeper:05d}", ignore_errors=True)
    with suppress(OSError):  # others keep something in it
        run.rmdir()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        run_id = name.rpartition("-")[0]
        raise UserError(f"the run's id {run_id!r} (file run_id) must be 1 to 64 letters, digits, '_' or '-'")


def _remove_with_others(path: Path) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        if path.exists():
            raise


def _places(run: Path) -> Iterator[tuple[int, int, Path]]:
    for keeper, holder in _numbered(run, _KEEPER):
        for owner, place in _numbered(holder, _OWNER):
            yield keeper, owner, place


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((number, path) for number, path in found if path.is_dir() and not path.is_symlink())
