"""Safetensors files of a checkpoint, read and checked byte by byte without torch."""

import errno
import json
import os
import struct
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from .manifest import (
    DIGEST_BYTES,
    DTYPES,
    CheckpointDamagedError,
    CheckpointUnreadableError,
    FileEntry,
    Manifest,
    Piece,
    digest,
    open_regular,
)

# blake2b takes 0.4 GB/s on one core and releases the interpreter lock: a few threads keep up with a fast disk.
NUM_THREADS = min(4, os.cpu_count() or 1)
READ_BYTES = 8 << 20


class PieceFile:
    """A safetensors file of a checkpoint, opened for reading: size and header are checked at once, pieces when read.

    Use it as a context manager. `read` may be called from several threads. Raises `CheckpointDamagedError`, one line
    that names the file and what differs.
    """

    def __init__(self, folder: Path, name: str, entry: FileEntry) -> None:
        self._where = f"checkpoint {folder}: {name}"
        self._entry = entry
        try:
            self._descriptor = open_regular(folder / name)
        except FileNotFoundError as error:
            raise CheckpointUnreadableError(f"{self._where} is missing") from error
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            size = os.fstat(self._descriptor).st_size
            if size != entry.bytes:
                raise CheckpointDamagedError(f"{self._where} has {size} bytes, {entry.bytes} were written")
            self._spans = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def read(self, piece: Piece, dtype: str, out: memoryview) -> None:
        """Fills `out` with the bytes of `piece`, which is of `dtype`, and checks their hash."""
        begin = self._begin(piece, dtype)
        sums = blake2b(digest_size=DIGEST_BYTES)
        done = 0
        while done < len(out):
            count = self._pread(out[done : done + READ_BYTES], begin + done)
            sums.update(out[done : done + count])
            done += count
        self._compare(piece, sums.hexdigest())

    def check(self, piece: Piece, dtype: str) -> None:
        """Checks the hash of `piece`, which is of `dtype`, and keeps none of it."""
        begin, buffer = self._begin(piece, dtype), memoryview(bytearray(min(READ_BYTES, piece.bytes)))
        sums = blake2b(digest_size=DIGEST_BYTES)
        done = 0
        while done < piece.bytes:
            count = self._pread(buffer[: piece.bytes - done], begin + done)
            sums.update(buffer[:count])
            done += count
        self._compare(piece, sums.hexdigest())

    def _compare(self, piece: Piece, found: str) -> None:
        if found != piece.blake2b:
            raise CheckpointDamagedError(f"{self._where} is not what was written (the hash of {piece.key!r} differs)")

    def _begin(self, piece: Piece, dtype: str) -> int:
        """Where the piece starts in the file, once the header and the manifest are known to agree on it."""
        kind, shape, begin, end = self._spans.get(piece.key, (None, None, 0, 0))
        if (kind, shape, end - begin) != (DTYPES[dtype][0], piece.sizes, piece.bytes):
            raise CheckpointDamagedError(f"{self._where}: the manifest and the header differ about {piece.key!r}")
        return begin

    def _read_header(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """(dtype, shape, begin, end) by key, in bytes of the file."""
        header = bytearray(self._entry.header_bytes)
        done = 0
        while done < len(header):
            done += self._pread(memoryview(header)[done:], done)
        if digest(memoryview(header)) != self._entry.header_blake2b:
            raise CheckpointDamagedError(f"{self._where} is not what was written (the hash of its header differs)")
        try:
            return _spans_of(bytes(header), self._entry)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointDamagedError(f"{self._where} has a malformed header ({error})") from error

    def _pread(self, target: memoryview, offset: int) -> int:
        try:
            count = os.preadv(self._descriptor, [target], offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if count == 0:
            raise CheckpointDamagedError(f"{self._where} ends before byte {offset}")
        return count

    def _unreadable(self, error: OSError) -> CheckpointDamagedError:
        # A bad sector is one for every reader; anything else may be a matter of this machine.
        kind = CheckpointDamagedError if error.errno == errno.EIO else CheckpointUnreadableError
        return kind(f"{self._where} cannot be read ({error.strerror or error})")


class PieceFiles:
    """The files of one checkpoint, each opened once, when first asked for. A context manager."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._open: dict[str, PieceFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()

    def __getitem__(self, name: str) -> PieceFile:
        if name not in self._open:
            self._open[name] = PieceFile(self._folder, name, self._manifest.files[name])
        return self._open[name]


def drop_from_cache(path: Path) -> None:
    """Lets the system forget what it holds of a synchronised file, so that the next read comes from the disk."""
    descriptor = open_regular(path)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _spans_of(header: bytes, entry: FileEntry) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    (length,) = struct.unpack_from("<Q", header)
    if length + 8 != len(header):
        raise ValueError(f"its length is {length}, not {len(header) - 8}")
    spans = {}
    for key, value in json.loads(header[8:]).items():
        begin, end = value["data_offsets"]
        if not 0 <= begin <= end <= entry.bytes - len(header):
            raise ValueError(f"{key!r} lies at {begin}:{end}")
        spans[key] = (value["dtype"], tuple(value["shape"]), len(header) + begin, len(header) + end)
    return spans
