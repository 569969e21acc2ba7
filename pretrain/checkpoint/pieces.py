"""Safetensors files of a checkpoint: written in one pass with a hash for each piece, every byte checked when read."""

import errno
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

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
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Source:
    """A piece to be written: its key, dtype and shape, and how to get the tensor when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: Callable[[], torch.Tensor]


def write_pieces(path: Path, sources: Iterable[Source]) -> tuple[FileEntry, dict[str, str]]:
    """Writes a new safetensors file, synchronised to disk; returns its entry and the blake2b of each piece by key.

    Tensors on the CPU that are contiguous are written and hashed from where they are, without a copy.
    Raises `OSError` (disk full, folder gone, file exists) with the file half written.
    """
    # Widest dtypes first, as the safetensors library does: every piece is then aligned to its dtype.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    header, size = _header(ordered)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write(descriptor, memoryview(header))
        digests: dict[str, Future[str]] = {}
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            # Copies from a GPU or of a strided tensor live until hashed: at most one a thread at a time.
            running: deque[Future[str]] = deque()
            for source in ordered:
                data = as_bytes(source.tensor().detach().cpu().contiguous())
                running.append(threads.submit(digest, data))
                digests[source.key] = running[-1]
                _write(descriptor, data)
                if len(running) > NUM_THREADS:
                    running.popleft().result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    entry = FileEntry(bytes=len(header) + size, header_bytes=len(header), header_blake2b=digest(header))
    return entry, {key: future.result() for key, future in digests.items()}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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

    def read(self, piece: Piece, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor of `piece`, hash checked; read into `out` (of its sizes, contiguous, on the CPU) if given."""
        begin = self._begin(piece, dtype)
        tensor = torch.empty(piece.sizes, dtype=dtype) if out is None else out
        sums = blake2b(digest_size=DIGEST_BYTES)
        data, done = as_bytes(tensor), 0
        while done < len(data):
            count = self._pread(data[done : done + _READ_BYTES], begin + done)
            sums.update(data[done : done + count])
            done += count
        if sums.hexdigest() != piece.blake2b:
            raise CheckpointDamagedError(f"{self._where} is not what was written (the hash of {piece.key!r} differs)")
        return tensor

    def _begin(self, piece: Piece, dtype: torch.dtype) -> int:
        """Where the piece starts in the file, once the header and the manifest are known to agree on it."""
        kind, shape, begin, end = self._spans.get(piece.key, (None, None, 0, 0))
        if (kind, shape, end - begin) != (DTYPES[dtype], piece.sizes, piece.bytes):
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


def _write(descriptor: int, data: memoryview) -> None:
    """Writes all of `data`: the system takes at most 2 GiB a call, and less when it likes."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def drop_from_cache(path: Path) -> None:
    """Lets the system forget what it holds of a synchronised file, so that the next read comes from the disk."""
    descriptor = open_regular(path)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _header(sources: list[Source]) -> tuple[bytes, int]:
    """The file's header, length prefix included, and the bytes of data that follow it."""
    entries: dict[str, Any] = {}
    end = 0
    for source in sources:
        begin, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        entries[source.key] = {"dtype": DTYPES[source.dtype], "shape": source.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


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


def load_tensor(files: PieceFiles, name: str, tensors: Mapping[str, Any]) -> torch.Tensor:
    """The whole tensor `name` on the CPU, put together from its pieces, every one checked."""
    entry = tensors[name]
    if len(entry.pieces) == 1:
        return files[entry.pieces[0].file].read(entry.pieces[0], entry.dtype)
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for piece in entry.pieces:
        part = files[piece.file].read(piece, entry.dtype)
        narrow(whole, piece.offsets, piece.sizes).copy_(part)
    return whole


def narrow(tensor: torch.Tensor, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """The box of `sizes` at `offsets`, a view."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
