"""Reading prepared data: memory-mapped shards, checked against the manifest and against their index."""

import json
import mmap
import stat
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from ..errors import UserError, file_error
from .manifest import SPLITS, TOKENIZER, read_manifest
from .order import LeastRecentlyUsed
from .shards import BLOCK, DTYPES, INDEX_COLUMNS, INDEX_SUFFIX, ShardEntry, hash_bytes, member_name
from .tokenizer import Tokenizer

# Two windows of the row order: reading never closes a shard that it will want again soon.
OPEN_SHARDS = 128
_REMEDY = "copy it again, or prepare the data again into a new folder"


class TokenDataset:
    """The documents of one split of a prepared folder, in the order they were written.

    Opening checks the manifest and the size of every shard and index; the first use of a shard checks its index
    against the manifest's hash; the first use of a document checks its tar header and its CRC-32. Anything that
    differs raises UserError with the file, what is wrong, and the remedy. Nothing is unpickled, and only regular
    files named in the manifest are opened.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}; use one of {', '.join(SPLITS)}")
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(self.folder)
        about = manifest.values["tokenizer"]
        self.fingerprint = manifest.fingerprint
        self.baselines = {
            program: manifest.values["splits"][split].get(f"{program}_bytes") for program in ("gzip", "xz")
        }
        self.dtype: str = manifest.values["dtype"]
        self.tokenizer_path = self.folder / TOKENIZER
        self.tokenizer_hash: str = about["hash"]
        self.vocab_size: int = about["vocab_size"]
        self.bos_id: int = about["bos_id"]
        self.eos_id: int = about["eos_id"]
        self.pad_id: int = about["pad_id"]
        self.shards = manifest.shards[split]
        if not self.shards:
            raise UserError(
                f"{self.folder} has no {split} documents; prepare the data again with another heldout_fraction"
            )
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self._document_ends = np.cumsum([shard.num_documents for shard in self.shards])
        self._open = LeastRecentlyUsed(OPEN_SHARDS)
        for shard in self.shards:
            _check_size(self._path(shard), shard.size)
            _check_size(self._path(shard).with_suffix(INDEX_SUFFIX), shard.index_size)

    def _path(self, shard: ShardEntry) -> Path:
        return self.folder / self.split / shard.name

    def shard(self, number: int) -> "Shard":
        """An open shard; the 128 used last stay open."""
        return self._open.get(number, lambda: Shard(self._path(self.shards[number]), self.shards[number], self.dtype))

    def document(self, i: int) -> np.ndarray:
        """Document `i`: BOS, tokens, EOS, as a read-only uint16 or uint32 array that shares the memory map."""
        shard, place = self._locate(i)
        return shard.document(place)

    def document_length(self, i: int) -> int:
        """The tokens of document `i`, BOS and EOS included, from the index alone."""
        shard, place = self._locate(i)
        return int(shard.num_tokens[place])

    def document_bytes(self, i: int) -> int:
        """The bytes of UTF-8 text that document `i` stands for."""
        shard, place = self._locate(i)
        return int(shard.text_bytes[place])

    def _locate(self, i: int) -> "tuple[Shard, int]":
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} is outside 0..{self.num_documents - 1}")
        number = int(np.searchsorted(self._document_ends, i, side="right"))
        return self.shard(number), i - int(self._document_ends[number]) + self.shards[number].num_documents

    def verify(self, first: int = 0, stride: int = 1) -> None:
        """Reads everything (the hash of each shard, the header and CRC of each document); UserError at a fault.

        Several processes share the shards out: each takes every `stride`-th from its `first` on.
        """
        for number in range(first, len(self.shards), stride):
            entry, shard = self.shards[number], self.shard(number)
            if hash_bytes(memoryview(shard.map)) != entry.blake2b:
                raise UserError(f"{shard.path} was changed: its blake2b sum is not the manifest's; {_REMEDY}")
            for place in range(entry.num_documents):
                shard.document(place)


class Shard:
    """One shard, mapped into memory, with the columns of its index (see `shards.INDEX_COLUMNS`)."""

    def __init__(self, path: Path, entry: ShardEntry, dtype: str) -> None:
        self.path = path
        self.entry = entry
        self.dtype = dtype
        columns = _read_index(path, entry, dtype)
        self.offset = columns["offset"]
        self.num_tokens = columns["num_tokens"]
        self.crc32 = columns["crc32"]
        self.text_bytes = columns["text_bytes"]
        self._checked = np.zeros(entry.num_documents, dtype=bool)
        try:
            with path.open("rb") as stream:
                self.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; {_REMEDY}") from None
        if len(self.map) != entry.size:
            raise UserError(f"{path} holds {len(self.map)} bytes, its manifest says {entry.size}; {_REMEDY}")

    def document(self, place: int) -> np.ndarray:
        """Document number `place` of this shard, checked the first time it is asked for."""
        tokens = np.frombuffer(
            self.map, DTYPES[self.dtype], count=int(self.num_tokens[place]), offset=int(self.offset[place])
        )
        if not self._checked[place]:
            self._check(place, tokens)
            self._checked[place] = True
        return tokens

    def _check(self, place: int, tokens: np.ndarray) -> None:
        start = int(self.offset[place])
        try:
            info: Any = tarfile.TarInfo.frombuf(self.map[start - BLOCK : start], "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            info = None
        name = member_name(place, self.dtype)
        if info is None or info.type != tarfile.REGTYPE or info.name != name or info.size != tokens.nbytes:
            raise UserError(f"{self.path}, member {name}: its tar header was changed; {_REMEDY}")
        if zlib.crc32(tokens.data) != self.crc32[place]:
            raise UserError(f"{self.path}, member {name}: its tokens were changed (CRC-32 differs); {_REMEDY}")


def check_tokenizer(dataset: TokenDataset, tokenizer: Tokenizer) -> None:
    """UserError unless `tokenizer` is the one that wrote the data."""
    if tokenizer.hash != dataset.tokenizer_hash:
        raise UserError(
            f"the tokenizer ({tokenizer.hash}) is not the one that wrote {dataset.folder} ({dataset.tokenizer_hash}); "
            f"use {dataset.tokenizer_path}, or prepare the data with tokenizer.path"
        )


def _check_size(path: Path, size: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise file_error(f"cannot read {path}: {error.strerror}; {_REMEDY}", error) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; {_REMEDY}")
    if status.st_size != size:
        raise UserError(f"{path} holds {status.st_size} bytes, its manifest says {size}; {_REMEDY}")


def _read_index(path: Path, entry: ShardEntry, dtype: str) -> dict[str, np.ndarray]:
    index_path = path.with_suffix(INDEX_SUFFIX)
    try:
        data = index_path.read_bytes()
    except OSError as error:
        raise file_error(f"cannot read {index_path}: {error.strerror}; {_REMEDY}", error) from None
    if hash_bytes(data) != entry.index_blake2b:
        raise UserError(f"{index_path} was changed: its blake2b sum is not the manifest's; {_REMEDY}")
    try:
        columns = load(data)
        fault = _index_fault(data, columns, entry, dtype)
    except (SafetensorError, ValueError, KeyError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"{index_path} is not the index of {path.name} ({fault}); {_REMEDY}")
    return columns


def _index_fault(data: bytes, columns: dict[str, np.ndarray], entry: ShardEntry, dtype: str) -> str | None:
    """What is wrong with an index whose bytes are those of the manifest: the manifest may be forged as well."""
    if {name: column.dtype for name, column in columns.items()} != INDEX_COLUMNS:
        return "its columns are not those of an index"
    if any(column.shape != (entry.num_documents,) for column in columns.values()):
        return f"it has not {entry.num_documents} documents"
    header_size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["headrace"])
    if (about["shard"], about["blake2b"], about["dtype"]) != (entry.name, entry.blake2b, dtype):
        return "it belongs to another shard"
    offset, num_tokens = columns["offset"], columns["num_tokens"]
    size = entry.size
    if (num_tokens < 1).any() or (num_tokens > size).any() or (offset < BLOCK).any() or (offset > size).any():
        return "a document is outside the shard"
    ends = offset + num_tokens * DTYPES[dtype].itemsize
    if ends[-1] > size or (offset[1:] < ends[:-1] + BLOCK).any():
        return "documents overlap or lie outside the shard"
    if num_tokens.sum() != entry.num_tokens or columns["text_bytes"].sum() != entry.text_bytes:
        return "its sums are not the manifest's"
    return None
