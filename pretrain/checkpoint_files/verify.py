"""Every byte of a checkpoint held against what was written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .manifest import CheckpointDamagedError, Manifest, Piece, read_manifest
from .piece_file import NUM_THREADS, PieceFile


@dataclass(frozen=True)
class Verified:
    """What was read of a checkpoint.

    Attributes:
        tensors: how many, those of single ranks included.
        bytes: of all files but the manifest.
        damage: a line for each thing that is not what was written; none where the checkpoint is whole.
    """

    tensors: int
    bytes: int
    damage: tuple[str, ...]


def verify_checkpoint(path: Path) -> Verified:
    """Reads every byte of the checkpoint `path` and checks every hash; goes on behind what is damaged.

    Raises:
        CheckpointError: `path` is no checkpoint, or one of a newer format.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointDamagedError as error:
        return Verified(0, 0, (error.damage,))
    damage: list[str] = []
    by_file: dict[str, list[tuple[Piece, str]]] = {name: [] for name in manifest.files}
    for piece, dtype in _pieces(manifest):
        by_file[piece.file].append((piece, dtype))
    for name, pieces in by_file.items():
        try:
            opened = PieceFile(path, name, manifest.files[name])
        except CheckpointDamagedError as error:
            damage.append(f"{error.damage}{_lost([piece.key for piece, _ in pieces])}")
            continue
        with opened, ThreadPoolExecutor(NUM_THREADS) as threads:
            found = threads.map(lambda entry, file=opened: _damage(file, *entry), pieces)
            damage += [line for line in found if line is not None]
    tensors = len(manifest.tensors) + sum(map(len, manifest.rank_tensors))
    return Verified(tensors, sum(entry.bytes for entry in manifest.files.values()), tuple(damage))


def _pieces(manifest: Manifest) -> Iterator[tuple[Piece, str]]:
    for tensors in (manifest.tensors, *manifest.rank_tensors):
        yield from chain.from_iterable(((p, entry.dtype) for p in entry.pieces) for entry in tensors.values())


def _lost(keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"; {keys[0]!r}{more} cannot be read"


def _damage(file: PieceFile, piece: Piece, dtype: str) -> str | None:
    try:
        file.check(piece, dtype)
    except CheckpointDamagedError as error:
        return error.damage
    return None
