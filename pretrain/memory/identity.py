"""What a copy in memory is of: it is used by a start that is the same in all of this, and by no other."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

# How what differs is put into words, in the order in which it is looked at.
WORDS = {
    "world_size": "another number of processes",
    "layout": "another layout",
    "data": "another data order",
    "optimizer": "another optimizer",
    "config": "another configuration",
    "code": "other code",
}


@dataclass(frozen=True)
class Identity:
    """What all copies of a start have in common, and what those of this rank have.

    Attributes:
        run: the run's id.
        start: number of the start.
        common: plain JSON by the keys of `WORDS`.
        pieces: a hash over which part of which tensor this rank holds.
    """

    run: str
    start: int
    common: Mapping[str, Any]
    pieces: str

    def misfit(self, saved: Mapping[str, Any]) -> str:
        """In what the `common` of a copy differs, in words; empty where it does not."""
        mine = json.loads(json.dumps(dict(self.common)))
        for key, words in WORDS.items():
            if saved.get(key) != mine.get(key):
                shown = f" ({saved.get(key)}, now {mine.get(key)})" if key in ("world_size", "layout") else ""
                return words + shown
        return ""


def digest_of(value: Any) -> str:
    """A hash of plain JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def describe_pieces(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash over which part of which tensor this rank holds: names, dtypes, shapes, placements, place in the mesh."""
    return digest_of([[name, *_describe(tensor)] for name, tensor in sorted(tensors.items())])


def _describe(tensor: torch.Tensor) -> list[Any]:
    whole = [str(tensor.dtype), list(tensor.shape)]
    if not isinstance(tensor, DTensor):
        return whole
    mesh = tensor.device_mesh
    placed = [str(placement) for placement in tensor.placements]
    return [*whole, list(tensor.to_local().shape), placed, list(mesh.shape), mesh.get_coordinate()]
