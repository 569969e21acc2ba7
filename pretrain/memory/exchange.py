"""A copy sent from rank to rank as it lies on its machine, manifest and file, over a group that nobody else uses."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..checkpoint.pieces import as_bytes
from ..checkpoint_files.folders import check_room, publish
from ..checkpoint_files.manifest import MANIFEST_NAME, CheckpointDamagedError, open_regular, read_manifest
from .copy_file import check_one_file, start_aside
from .folder import data_file

# Sent and received at a time; a rank needs memory for one of each.
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Parcel:
    """A copy on its way: the rank it is of, its folder here (to be read or made), and the rank at the other end."""

    owner: int
    path: Path
    other: int


def exchange(send: Parcel | None, receive: Parcel | None, group: dist.ProcessGroup) -> None:
    """Send a copy and receive another at the same time, where there is one; the other ends do the same.

    What fails on one side is met there alone, when all has been sent and received: nobody is left waiting.

    Raises:
        OSError: what is to be sent cannot be read, or what is received not written.
        CheckpointDamagedError: what came is no whole copy.
        RuntimeError: the other rank is gone.
    """
    errors: list[Exception] = []
    active = [_send(send, group, errors)] if send else []
    active += [_receive(receive, group, errors)] if receive else []
    while active:
        begun = [(part, work) for part in active if (work := next(part, None)) is not None]
        for _, work in begun:
            work.wait()
        active = [part for part, _ in begun]
    if errors:
        raise errors[0]


def _send(parcel: Parcel, group: dist.ProcessGroup, errors: list[Exception]) -> Iterator[dist.Work | None]:
    """The messages of one side. What cannot be read is sent as zeros, which no hash lets pass."""
    manifest, descriptor, size = b"", None, 0
    try:
        manifest = (parcel.path / MANIFEST_NAME).read_bytes()
        descriptor = open_regular(parcel.path / data_file(parcel.owner))
        size = os.fstat(descriptor).st_size
    except OSError as error:
        errors.append(error)
    try:
        yield dist.isend(torch.tensor([len(manifest), size]), parcel.other, group=group)
        if manifest:
            yield dist.isend(torch.frombuffer(bytearray(manifest), dtype=torch.uint8), parcel.other, group=group)
        buffer = torch.empty(min(CHUNK_BYTES, size), dtype=torch.uint8)
        for offset in range(0, size, CHUNK_BYTES):
            chunk = buffer[: size - offset]
            try:
                _read(descriptor, as_bytes(chunk), offset)
            except OSError as error:
                errors.append(error)
                chunk.zero_()
            yield dist.isend(chunk, parcel.other, group=group)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _receive(parcel: Parcel, group: dist.ProcessGroup, errors: list[Exception]) -> Iterator[dist.Work | None]:
    """The messages of the other side; the copy is made visible when it is whole by manifest, size and header."""
    sizes = torch.zeros(2, dtype=torch.int64)
    yield dist.irecv(sizes, parcel.other, group=group)
    manifest, size = torch.empty(int(sizes[0]), dtype=torch.uint8), int(sizes[1])
    if len(manifest):
        yield dist.irecv(manifest, parcel.other, group=group)
    aside, descriptor = None, None
    try:
        try:
            aside = start_aside(parcel.path)
            check_room(aside, size)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(aside / data_file(parcel.owner), flags, 0o600)
        except OSError as error:
            errors.append(error)
        buffer = torch.empty(min(CHUNK_BYTES, size), dtype=torch.uint8)
        for offset in range(0, size, CHUNK_BYTES):
            chunk = buffer[: size - offset]
            yield dist.irecv(chunk, parcel.other, group=group)
            if not errors:
                try:
                    _write(descriptor, as_bytes(chunk))
                except OSError as error:
                    errors.append(error)
        if aside is not None and not errors:
            _finish(parcel, aside, bytes(as_bytes(manifest)), errors)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _finish(parcel: Parcel, aside: Path, manifest: bytes, errors: list[Exception]) -> None:
    try:
        (aside / MANIFEST_NAME).write_bytes(manifest)
        check_one_file(aside, read_manifest(aside), parcel.owner).close()
        publish(aside, parcel.path)
    except (OSError, CheckpointDamagedError) as error:
        errors.append(error)


def _read(descriptor: int | None, out: memoryview, offset: int) -> None:
    assert descriptor is not None
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise OSError("it ends early")
        done += count


def _write(descriptor: int | None, data: memoryview) -> None:
    assert descriptor is not None
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])
