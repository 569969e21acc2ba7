"""Checks of what a run reads and writes: the data, the run folder, its file system, and room for checkpoints."""

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from ..data import TokenDataset, Tokenizer, check_tokenizer
from ..errors import UserError
from ..pretrain.config import Config
from ..pretrain.memory import KEEP, check_private
from ..pretrain.memory.folder import copies_name, size_of_run
from ..pretrain.run_clock import RUN_ID
from ..pretrain.run_folder import check_unchanged
from .findings import Finding
from .network import gather
from .status import read_status

# A network file system may show a new file to other machines some seconds late.
VISIBLE_S = 10.0
# Of what a rank holds, and of what its peer does: those that stay, and one that is made.
COPIES = 2 * (KEEP + 1)
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"}


def check_data(config: Config) -> Finding:
    """The prepared data by its manifest and the sizes of its files, and the tokenizer by its hash.

    Raises:
        UserError: something is missing or differs.
    """
    splits = ["train", "heldout"] if config.eval.every_steps else ["train"]
    found = [TokenDataset(config.data.folder, split) for split in splits]
    check_tokenizer(found[0], Tokenizer.load(found[0].tokenizer_path))
    if found[0].vocab_size > config.model.vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {found[0].vocab_size}")
    shards, tokens = sum(len(data.shards) for data in found), sum(data.num_tokens for data in found)
    text = f"{config.data.folder}: {shards} shards of {' and '.join(splits)}, {tokens:,} tokens, all of the right size"
    return Finding("data", "ok", f"{text}; fingerprint {found[0].fingerprint}", everywhere=True)


def verify_data(config: Config, place: int, stride: int) -> Finding:
    """The hash of every shard, shared out over the processes of a machine: this one takes every `stride`-th.

    Raises:
        UserError: a shard was changed.
    """
    splits = ["train", "heldout"] if config.eval.every_steps else ["train"]
    found = [TokenDataset(config.data.folder, split) for split in splits]
    for data in found:
        data.verify(place, stride)
    return Finding("hashes", "ok", f"all {sum(len(data.shards) for data in found)} shards are what the manifest says")


def check_run_folder(config: Config) -> Finding:
    """Whether the file system of the run folder keeps its promises, and what is in the folder lets the run go on.

    Raises:
        UserError: the folder holds another run.
        OSError: it cannot be written to.
    """
    folder = config.run.folder
    base = existing_parent(folder)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=base) as name:
        if fault := file_system_fault(Path(name)):
            return Finding("run folder", "FAIL", f"{base}: {fault}; choose another run.root")
    good = f"{base} is writable, renames in one step and locks"
    if folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
        return Finding("run folder", "FAIL", f"{folder} may be written to by everyone; chmod o-w {folder}")
    if not (folder / "config.toml").exists():
        return Finding("run folder", "ok", f"{good}; {folder} is new")
    check_unchanged(folder, config)
    status = read_status(folder)
    if status.state == "running":
        return Finding("run folder", "warn", f"{good}; {folder} is running {status.detail}")
    return Finding("run folder", "ok", f"{good}; {folder} goes on from {status.checkpoint or 'the beginning'}")


def file_system_fault(folder: Path) -> str:
    """What a file system does not do that a run needs, tried in an empty folder; empty where it does all."""
    old, new = folder / "old", folder / "new"
    for path, text in ((old, "old"), (new, "new")):
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    new.replace(old)
    if old.read_text() != "new" or new.exists():
        return "a file was not replaced by one that was renamed"
    (folder / "aside").mkdir()
    (folder / "aside" / "piece").touch()
    (folder / "aside").rename(folder / "step")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not (folder / "step" / "piece").exists():
        return "a folder was not renamed with what is in it"
    with old.open("a") as first, old.open("a") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    return "a file that was locked could be locked again: two processes could use one run folder"


def check_shared_folder(folder: Path, hosts: list[str]) -> list[Finding]:
    """Whether all processes see the same file system and its locks, as checkpoints need; the same on all. Collective.

    Nothing on one machine.
    """
    if len(set(hosts)) == 1:
        return []
    is_first, probe, lock, error = dist.get_rank() == 0, Path(), None, ""
    try:
        if is_first:
            probe = existing_parent(folder) / f".preflight-{secrets.token_hex(6)}"
            lock = probe.open("x")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as met:
        error = f"{probe}: {met.strerror}"
    probe, error = gather((probe, error))[0]
    faults = [error] if error else gather("" if is_first else _fault_from_here(probe))
    if lock is not None:
        lock.close()
        probe.unlink(missing_ok=True)
    bad = {host: fault for host, fault in zip(hosts, faults, strict=False) if fault}
    if bad:
        words = "; ".join(f"{fault} ({host})" for host, fault in bad.items())
        return [Finding("shared folder", "FAIL", f"{words}; run.root must be on a file system that all machines share")]
    return [Finding("shared folder", "ok", f"all {len(set(hosts))} machines see {probe.parent} and its locks")]


def _fault_from_here(probe: Path) -> str:
    until = time.monotonic() + VISIBLE_S
    while not probe.exists():
        if time.monotonic() > until:
            return f"{probe.parent} is not what the first process sees"
        time.sleep(0.1)
    try:
        with probe.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as met:
        return f"{probe.parent}: {met.strerror}"
    return f"a lock in {probe.parent} is not seen here"


def check_disk(config: Config, checkpoint_bytes: int) -> Finding:
    """Whether there is room for all checkpoints that lie there at once: `checkpoint.keep_last`, and one in writing."""
    wanted = config.checkpoint.keep_last + 1
    there = sum(1 for _ in config.run.folder.glob("checkpoints/step-*"))
    free = shutil.disk_usage(existing_parent(config.run.folder)).free
    needed = max(1, wanted - there) * checkpoint_bytes
    text = f"a checkpoint holds {checkpoint_bytes:,} bytes of tensors; {max(1, wanted - there)} more need {needed:,}, "
    text += f"and {free:,} are free"
    if needed > free:
        return Finding("disk", "FAIL", f"{text}; make room, or lower checkpoint.keep_last={wanted - 1}")
    return Finding("disk", "warn" if 2 * needed > free else "ok", text)


def check_memory_folder(config: Config, saved_bytes: int, neighbours: int) -> Finding:
    """Whether copies in memory have a place on this machine that is in memory, and room there.

    Args:
        config: of the run, which makes such copies.
        saved_bytes: parameters and optimizer state of this rank.
        neighbours: processes on this machine.

    Raises:
        UserError: the folder is another user's, or open to others; or the run's id cannot name what is in it.
        OSError: it cannot be made or looked at.
    """
    folder = Path(config.checkpoint.memory_folder)
    if os.path.lexists(folder):
        check_private(folder)
    base = existing_parent(folder)
    if not os.access(base, os.W_OK | os.X_OK):
        return Finding("memory copies", "FAIL", f"{base} cannot be written to; set another checkpoint.memory_folder")
    # What the run has there already makes room for what is to come.
    own = _size_of_copies(config)
    needed, free = COPIES * saved_bytes * neighbours, shutil.disk_usage(base).free + own
    text = f"{COPIES} copies of {neighbours} ranks need {needed / 1e9:.3f} GB in {folder}, {free / 1e9:.1f} are free"
    text += f" with the {own / 1e9:.3f} of those that are there" if own else ""
    if needed > free:
        return Finding("memory copies", "FAIL", f"{text}; set checkpoint.memory_every_steps=0, or use more machines")
    if (kind := file_system(base)) not in MEMORY_FILE_SYSTEMS:
        return Finding("memory copies", "warn", f"{text}; but {base} is not in memory ({kind}): /dev/shm/NAME is")
    return Finding("memory copies", "ok", text)


def _size_of_copies(config: Config) -> int:
    """The bytes that the run has in memory on this machine by now; 0 before its first start."""
    try:
        run_id = (config.run.folder / RUN_ID).read_text(errors="replace").strip()
    except FileNotFoundError:
        return 0
    return size_of_run(Path(config.checkpoint.memory_folder), copies_name(run_id, config.run.folder)) if run_id else 0


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as Linux names it; `unknown` elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    # Later mounts hide earlier ones; a space in a path is written as \040.
    kinds = {Path(where.replace("\\040", " ")): kind for _, where, kind, *_ in mounts}
    place = folder.resolve()
    return next((kinds[parent] for parent in (place, *place.parents) if parent in kinds), "unknown")


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
