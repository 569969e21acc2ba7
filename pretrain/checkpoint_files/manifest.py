"""The manifest of a checkpoint: what was saved, where each piece lies, and the sums to check it by."""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = "headrace-checkpoint"
VERSION = 1
DIGEST_BYTES = 32
# The dtypes a checkpoint may hold, by torch's name: their name in the safetensors format, and bytes.
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")
_TAIL = re.compile(rb',\n "blake2b": "([0-9a-f]{%d})"\n}\n\Z' % (2 * DIGEST_BYTES))


class CheckpointError(UserError):
    """A checkpoint cannot be written, or not loaded into what was asked for; one line says why and what to do."""


class CheckpointWriteError(CheckpointError):
    """A disk did not take a checkpoint: trying again may help."""


class CheckpointDamagedError(CheckpointError):
    """Something of a checkpoint is missing or is not what was written.

    Args:
        damage: where and what.
        offer: what to go on from instead, where that is known.

    Attributes:
        damage: the same, without the offer.
    """

    def __init__(self, damage: str, offer: str = "") -> None:
        super().__init__(f"{damage}; {offer}" if offer else damage)
        self.damage = damage


class CheckpointUnreadableError(CheckpointDamagedError):
    """A file of a checkpoint is missing or cannot be read, on this machine at least."""


@dataclass(frozen=True)
class Piece:
    """One box of a tensor: `sizes` elements from `offsets` on, stored under `key` in `file`, with its blake2b."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor by its global shape and dtype (torch's name of it), and the pieces that tile it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file: its size, and the size (length prefix included) and blake2b of its header, both in bytes."""

    bytes: int
    header_bytes: int
    header_blake2b: str


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but the numbers: files, tensors by name, each rank's own tensors, and the JSON `extra`."""

    step: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    rank_tensors: tuple[Mapping[str, TensorEntry], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def digest(data: bytes | memoryview) -> str:
    """The blake2b of `data` in hexadecimal."""
    return blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as a JSON file whose last entry, on a line of its own, is the blake2b of every byte before it.

    Raises `TypeError` or `ValueError` when `extra` is not plain JSON (NaN and infinity are not).
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "extra": manifest.extra,
        "files": {name: vars(entry) for name, entry in manifest.files.items()},
        "tensors": {name: _tensor_json(entry) for name, entry in manifest.tensors.items()},
        "rank_tensors": [{name: _tensor_json(e) for name, e in own.items()} for own in manifest.rank_tensors],
    }
    # There may be a hundred thousand pieces: an indent or `asdict` would take ten times as long as the encoder in C.
    text = json.dumps(body, allow_nan=False).removesuffix("}").encode()
    return text + f',\n "blake2b": "{digest(text)}"\n}}\n'.encode()


def read_manifest(path: Path) -> Manifest:
    """The verified manifest of the checkpoint folder `path`.

    Raises `CheckpointError` when the folder is no checkpoint or is of a newer format, and `CheckpointDamagedError` when
    the manifest is missing from a `step-` folder, is not what was written, or describes something impossible.
    """
    text = _read_whole(path)
    tail = _TAIL.search(text)
    if tail is None or digest(memoryview(text)[: tail.start()]) != tail[1].decode():
        raise CheckpointDamagedError(f"checkpoint {path}: {MANIFEST_NAME} is not what was written (its hash differs)")
    try:
        body = json.loads(text)
        if body["format"] != FORMAT:
            raise ValueError(f"format is {body['format']!r}")
        if body["version"] > VERSION:
            raise CheckpointError(
                f"checkpoint {path} has format version {body['version']}; this Headrace reads {VERSION}: update it"
            )
        return _manifest_of(body)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise CheckpointDamagedError(f"checkpoint {path}: {MANIFEST_NAME} is malformed ({reason})") from error


def open_regular(path: Path) -> int:
    """A descriptor to read the regular file `path`; a symbolic link, device or pipe raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def _read_whole(path: Path) -> bytes:
    try:
        with open(open_regular(path / MANIFEST_NAME), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_dir() and path.name.startswith("step-"):
            raise CheckpointUnreadableError(f"checkpoint {path}: {MANIFEST_NAME} is missing") from error
        inside = sorted(path.glob("step-*")) if path.is_dir() else []
        hint = f"; did you mean {inside[-1]}?" if inside else "; give a folder named step-NNNNNNNN"
        raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST_NAME}{hint}") from error
    except OSError as error:
        raise CheckpointUnreadableError(f"checkpoint {path}: cannot read {MANIFEST_NAME} ({_reason(error)})") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _tensor_json(entry: TensorEntry) -> dict[str, Any]:
    return {
        "dtype": entry.dtype,
        "shape": entry.shape,
        "pieces": [vars(piece) for piece in entry.pieces],
    }


def _manifest_of(body: dict[str, Any]) -> Manifest:
    files = {_file_name(name): FileEntry(**entry) for name, entry in body["files"].items()}
    for name, entry in files.items():
        if not 8 <= _count(entry.header_bytes) <= _count(entry.bytes):
            raise ValueError(f"{name} has a header of {entry.header_bytes} in {entry.bytes} bytes")
    return Manifest(
        step=_count(body["step"]),
        files=files,
        tensors={name: _tensor_of(name, entry, files) for name, entry in body["tensors"].items()},
        rank_tensors=tuple(
            {name: _tensor_of(name, entry, files) for name, entry in own.items()} for own in body["rank_tensors"]
        ),
        extra=dict(body["extra"]),
    )


def _tensor_of(name: str, body: dict[str, Any], files: Mapping[str, FileEntry]) -> TensorEntry:
    (_, itemsize), shape = DTYPES[body["dtype"]], tuple(_count(size) for size in body["shape"])
    pieces = tuple(_piece_of(piece) for piece in body["pieces"])
    for piece in pieces:
        if piece.file not in files:
            raise ValueError(f"{name} is in {piece.file!r}, which is not among the files")
        if piece.bytes != math.prod(piece.sizes) * itemsize:
            raise ValueError(f"a piece of {name} has {piece.bytes} bytes for sizes {piece.sizes}")
    check_tiling(name, shape, pieces)
    return TensorEntry(body["dtype"], shape, pieces)


def _piece_of(body: dict[str, Any]) -> Piece:
    boxes = {key: tuple(_count(value) for value in body[key]) for key in ("offsets", "sizes")}
    if not all(isinstance(body[key], str) for key in ("file", "key", "blake2b")):
        raise ValueError("a piece's file, key or blake2b is not text")
    return Piece(**(body | boxes))


def check_tiling(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    """Raises `ValueError` unless the pieces lie inside `shape` and together have as many elements.

    Distinct offsets and an exact total leave no element unwritten in any layout that DTensor makes.
    """
    for piece in pieces:
        inside = len(piece.offsets) == len(piece.sizes) == len(shape) and all(
            offset + size <= whole for offset, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a piece of {name} at {piece.offsets} of {piece.sizes} is outside the shape {shape}")
    filled = sum(math.prod(piece.sizes) for piece in pieces)
    if filled != math.prod(shape) or len({piece.offsets for piece in pieces}) != len(pieces):
        raise ValueError(f"the pieces of {name} do not tile its shape {shape}")


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r} is not of the form rank-NNNNN.safetensors")
    return name


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
