"""Token shards: ordinary USTAR tar files, one member a document, and the index that makes them random access.

A member `NNNNNNNN.u16` (or `.u32`) holds the document's token ids, BOS and EOS included, little-endian. Plain
WebDataset iterates such a file; a memory map and the index reach any document of it without reading the others.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

BLOCK = tarfile.BLOCKSIZE
INDEX_SUFFIX = ".idx.safetensors"
# One column a document: where its tokens begin in the tar, how many, their CRC-32, and the bytes of its text.
INDEX_COLUMNS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype(np.int64),
    "num_tokens": np.dtype(np.int64),
    "crc32": np.dtype(np.uint32),
    "text_bytes": np.dtype(np.int64),
}
DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of one shard: names, sizes in bytes and blake2b sums of the tar and of its index."""

    name: str
    size: int
    blake2b: str
    index_size: int
    index_blake2b: str
    num_documents: int
    num_tokens: int
    text_bytes: int

    @classmethod
    def from_json(cls, value: Any) -> "ShardEntry":
        """The entry of a manifest; ValueError where a field is missing, unknown, or of another type."""
        if not isinstance(value, dict) or set(value) != {item.name for item in fields(cls)}:
            raise ValueError("its fields are not those of a shard")
        for item in fields(cls):
            if type(value[item.name]) is not item.type or (item.type is int and value[item.name] < 0):
                raise ValueError(f'"{item.name}" is not a valid {item.type.__name__}')  # type: ignore[union-attr]
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """The entry as the manifest holds it."""
        return asdict(self)


def hash_bytes(data: bytes | memoryview) -> str:
    """The blake2b sum (16 bytes, hexadecimal) that manifests hold."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def member_name(number: int, dtype: str) -> str:
    """The name of document `number` of a shard."""
    return f"{number:08d}.{dtype}"


def member_header(number: int, dtype: str, size: int) -> bytes:
    """The tar header block of a document: the same bytes whoever writes it, and whenever."""
    info = tarfile.TarInfo(member_name(number, dtype))
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


class ShardWriter:
    """Writes documents into `00000.tar`, `00001.tar`, … of a folder, with an index beside each.

    A shard is closed when the next document would take it past `max_bytes`; a longer document has its own shard.
    """

    def __init__(self, folder: Path, *, dtype: str, max_bytes: int, tokenizer_hash: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.tokenizer_hash = tokenizer_hash
        self.entries: list[ShardEntry] = []
        self._shard: _OpenShard | None = None

    def add(self, tokens: Sequence[int], text_bytes: int) -> int:
        """Appends a document (ids with BOS and EOS); returns its number of tokens."""
        values = np.array(tokens, DTYPES[self.dtype])
        data = values.tobytes()
        if self._shard is not None and self._shard.size + _padded(len(data)) + 3 * BLOCK > self.max_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = _OpenShard(self.folder / f"{len(self.entries):05d}.tar", self.dtype)
        self._shard.add(data, len(values), text_bytes)
        return len(values)

    def close(self) -> list[ShardEntry]:
        """Closes the last shard and returns the entries of all."""
        if self._shard is not None:
            self._close_shard()
        return self.entries

    def abandon(self) -> None:
        """Closes the open file, if there is one, without finishing it."""
        if self._shard is not None:
            self._shard.stream.close()

    def _close_shard(self) -> None:
        assert self._shard is not None
        self.entries.append(self._shard.finish(self.tokenizer_hash))
        self._shard = None


class _OpenShard:
    """A shard being written: the tar grows on disk, its index in memory."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        self.size = 0
        self.columns: dict[str, list[int]] = {name: [] for name in INDEX_COLUMNS}
        self.digest = hashlib.blake2b(digest_size=16)
        self.stream = path.open("xb")

    def _write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)
        self.size += len(data)

    def add(self, data: bytes, num_tokens: int, text_bytes: int) -> None:
        self._write(member_header(len(self.columns["offset"]), self.dtype, len(data)))
        row = (self.size, num_tokens, zlib.crc32(data), text_bytes)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self._write(data + bytes(_padded(len(data)) - len(data)))

    def finish(self, tokenizer_hash: str) -> ShardEntry:
        self._write(bytes(2 * BLOCK))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        columns = {name: np.array(self.columns[name], dtype) for name, dtype in INDEX_COLUMNS.items()}
        about = {
            "shard": self.path.name,
            "size": self.size,
            "blake2b": self.digest.hexdigest(),
            "dtype": self.dtype,
            "tokenizer": tokenizer_hash,
        }
        # One metadata entry only: safetensors writes several in no fixed order.
        index = save(columns, metadata={"headrace": json.dumps(about)})
        write_file(self.path.with_suffix(INDEX_SUFFIX), index)
        return ShardEntry(
            name=self.path.name,
            size=self.size,
            blake2b=self.digest.hexdigest(),
            index_size=len(index),
            index_blake2b=hash_bytes(index),
            num_documents=len(columns["offset"]),
            num_tokens=int(columns["num_tokens"].sum()),
            text_bytes=int(columns["text_bytes"].sum()),
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
