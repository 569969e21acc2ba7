"""Reads the fields of a sentencepiece model file that a conversion needs, with no protobuf package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ...errors import UserError


class PieceType(IntEnum):
    """Kinds of piece, numbered as in sentencepiece's `ModelProto`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its id is its place in `SpmModel.pieces`."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True)
class SpmModel:
    """What a `tokenizer.model` file says: pieces in id order, special ids (-1: none), and how text is normalised."""

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    normalizer: str
    has_charsmap: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_spm_model(path: str | Path) -> SpmModel:
    """Reads a sentencepiece model file (the `ModelProto` of sentencepiece_model.proto).

    Raises `UserError` where the file is missing or is not a sentencepiece model.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a tokenizer ({error.strerror}); give a tokenizer.model") from error
    try:
        return _parse_model(data)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({error}); train one with `headrace prepare`") from error


def _parse_model(data: bytes) -> SpmModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value))
        elif field == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it holds no pieces")

    # A field left out of the file has the default written in sentencepiece_model.proto.
    def number(spec: dict[int, int | bytes], field: int, default: int) -> int:
        value = spec.get(field, default)
        if not isinstance(value, int):
            raise ValueError(f"field {field} is not a number")
        return value - (1 << 64) if value >= 1 << 63 else value

    name = normalizer.get(1, b"")
    return SpmModel(
        pieces=tuple(pieces),
        algorithm=_ALGORITHMS.get(number(trainer, 3, 1), "unknown"),
        byte_fallback=bool(number(trainer, 35, 0)),
        unk_id=number(trainer, 40, 0),
        bos_id=number(trainer, 41, 1),
        eos_id=number(trainer, 42, 2),
        pad_id=number(trainer, 43, -1),
        normalizer=name.decode() if isinstance(name, bytes) else "",
        has_charsmap=bool(normalizer.get(2, b"")),
        add_dummy_prefix=bool(number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(number(normalizer, 4, 1)),
        escape_whitespaces=bool(number(normalizer, 5, 1)),
    )


def _parse_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif field == 3 and isinstance(value, int):
            kind = PieceType(value)
    return Piece(text=text, score=score, type=kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of one protobuf message: varints as numbers, everything else as its raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends inside a field at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {at}")
