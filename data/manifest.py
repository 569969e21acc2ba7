"""`manifest.json` of a prepared folder: what is there, and what it was made from. Its hash is the data fingerprint."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, file_error
from .shards import DTYPES, ShardEntry, hash_bytes

FORMAT = "headrace-tokens-1"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "heldout")
_SHARD_NAME = re.compile(r"[0-9]{5,9}\.tar")
_NUMBERS = ("vocab_size", "bos_id", "eos_id", "pad_id")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checked manifest: `values` as written, the `shards` of each split, and the `fingerprint` of its bytes."""

    values: Mapping[str, Any]
    shards: Mapping[str, tuple[ShardEntry, ...]]
    fingerprint: str


def write_manifest(values: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest; equal values give equal bytes."""
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a prepared folder; UserError when it is missing or not one of ours."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no prepared data (no {MANIFEST}); run `headrace prepare` first") from None
    except OSError as error:
        raise file_error(f"cannot read {path}: {error.strerror}", error) from None
    try:
        values = json.loads(data)
        shards = _checked_shards(values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again into a new folder") from None
    return Manifest(values=values, shards=shards, fingerprint=hash_bytes(data))


def _checked_shards(values: Any) -> dict[str, tuple[ShardEntry, ...]]:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'"format" is not {FORMAT}')
    if values["dtype"] not in DTYPES:
        raise ValueError(f'"dtype" is not one of {", ".join(DTYPES)}')
    for name in _NUMBERS:
        if type(values["tokenizer"][name]) is not int or values["tokenizer"][name] < 0:
            raise ValueError(f'tokenizer "{name}" is not a number')
    if not isinstance(values["tokenizer"]["hash"], str):
        raise ValueError('tokenizer "hash" is not a string')
    shards = {}
    for split in SPLITS:
        entries = tuple(ShardEntry.from_json(entry) for entry in values["splits"][split]["shards"])
        names = [entry.name for entry in entries]
        if bad := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
            raise ValueError(f"shard name {bad[0]!r} is not of the form 00000.tar")
        if len(set(names)) != len(names):
            raise ValueError(f"a shard of {split} is named twice")
        shards[split] = entries
    return shards
