"""Tensors to and from safetensors files: written in one pass with a hash for each piece, each checked when read."""

import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files.manifest import DTYPES, FileEntry, Piece, TensorEntry, digest
from ..checkpoint_files.piece_file import NUM_THREADS, PieceFile, PieceFiles


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype, as a manifest has it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that `dtype_name` names."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


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


def _write(descriptor: int, data: memoryview) -> None:
    """Writes all of `data`: the system takes at most 2 GiB a call, and less when it likes."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _header(sources: list[Source]) -> tuple[bytes, int]:
    """The file's header, length prefix included, and the bytes of data that follow it."""
    entries: dict[str, Any] = {}
    end = 0
    for source in sources:
        begin, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        entries[source.key] = {
            "dtype": DTYPES[dtype_name(source.dtype)][0],
            "shape": source.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def read_piece(file: PieceFile, piece: Piece, dtype: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor of `piece`, hash checked; read into `out` (of its sizes, contiguous, on the CPU) if given."""
    tensor = torch.empty(piece.sizes, dtype=dtype_of(dtype)) if out is None else out
    file.read(piece, dtype, as_bytes(tensor))
    return tensor


def load_tensor(files: PieceFiles, name: str, tensors: Mapping[str, TensorEntry]) -> torch.Tensor:
    """The whole tensor `name` on the CPU, put together from its pieces, every one checked."""
    entry = tensors[name]
    if len(entry.pieces) == 1:
        return read_piece(files[entry.pieces[0].file], entry.pieces[0], entry.dtype)
    whole = torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
    for piece in entry.pieces:
        part = read_piece(files[piece.file], piece, entry.dtype)
        narrow(whole, piece.offsets, piece.sizes).copy_(part)
    return whole


def narrow(tensor: torch.Tensor, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """The box of `sizes` at `offsets`, a view."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
