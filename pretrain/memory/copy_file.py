"""One copy: a checkpoint folder with the tensors of one rank, as they lie on it, written and read without pickle."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.pieces import Source, dtype_name, load_tensor, read_piece, write_pieces
from ..checkpoint_files.folders import check_room, publish, temporary_path
from ..checkpoint_files.manifest import (
    MANIFEST_NAME,
    CheckpointDamagedError,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    manifest_bytes,
    read_manifest,
)
from ..checkpoint_files.piece_file import NUM_THREADS, PieceFile, PieceFiles
from .folder import data_file
from .identity import Identity
from .plan import Holding, Moment

# The entry of a manifest's `extra` that is the copy's own; the rest is that of a checkpoint.
MEMORY = "memory"
_RANDOM = "rank."


@dataclass(frozen=True)
class Copied:
    """What a copy holds beside the tensors: `extra` and random states, and the hash of its manifest."""

    extra: dict[str, Any]
    random_states: dict[str, torch.Tensor]
    manifest: str


def write_copy(
    path: Path,
    owner: int,
    tensors: Mapping[str, torch.Tensor],
    random_states: Mapping[str, torch.Tensor],
    extra: Mapping[str, Any],
) -> None:
    """Write a copy at `path`: aside, and renamed when it is whole.

    Args:
        path: ends in the name of a checkpoint folder.
        owner: the rank it is of.
        tensors: by name, on the CPU.
        random_states: of that rank.
        extra: plain JSON, with what `memory_entry` makes.

    Raises:
        OSError: no room, or the folder is gone.
    """
    aside = start_aside(path)
    own = {f"{_RANDOM}{name}": tensor for name, tensor in random_states.items()}
    sources = [Source(k, t.dtype, tuple(t.shape), partial(_same, t)) for k, t in {**tensors, **own}.items()]
    check_room(aside, sum(t.numel() * t.itemsize for t in {**tensors, **own}.values()))
    file = data_file(owner)
    entry, digests = write_pieces(aside / file, sources)
    manifest = Manifest(
        step=int(extra[MEMORY]["moment"]["step"]),
        files={file: entry},
        tensors={name: _entry(name, tensor, file, digests) for name, tensor in tensors.items()},
        rank_tensors=({key: _entry(key, tensor, file, digests) for key, tensor in own.items()},),
        extra=extra,
    )
    (aside / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    publish(aside, path)


def start_aside(path: Path) -> Path:
    """An empty hidden folder beside `path`, to be made visible by `publish`."""
    aside = temporary_path(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def memory_entry(identity: Identity, owner: int, moment: Moment) -> dict[str, Any]:
    """What a copy says of itself, an entry of its `extra`."""
    common, pieces = dict(identity.common), identity.pieces
    about = {"run": identity.run, "rank": owner, "moment": asdict(moment), "common": common, "pieces": pieces}
    return {MEMORY: about}


def look_at(path: Path, keeper: int, owner: int, seen_by: int, identity: Identity, rewinds: int) -> Holding:
    """What the copy at `path` is, by its manifest and its file's size and header; for a run that went back so often.

    Raises:
        CheckpointError: it is damaged, or not the copy that its place says.
    """
    manifest = read_manifest(path)
    check_one_file(path, manifest, owner).close()
    try:
        said = manifest.extra[MEMORY]
        moment = Moment(**said["moment"])
        is_here = (said["run"], said["rank"], moment.step) == (identity.run, owner, manifest.step)
        if not is_here or path.name != f"step-{moment.step:08d}":
            raise CheckpointDamagedError(f"{path} is a copy of something else than its place says")
        misfit, pieces = identity.misfit(said["common"]), str(said["pieces"])
        if not misfit and moment.rewinds < rewinds:
            misfit = "the time before the run went back to a checkpoint"
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(f"{path} does not say what it is a copy of ({error})") from error
    return Holding(seen_by, keeper, owner, moment, pieces, str(path), _hash_of(path), misfit)


def read_copy(path: Path, owner: int, into: Mapping[str, torch.Tensor]) -> Copied:
    """Fill `into`, CPU tensors by name, from the copy at `path`, every byte checked.

    Raises:
        CheckpointDamagedError: it is not what was written, or not of these tensors. Some may have been filled.
        OSError: it is gone.
    """
    manifest = read_manifest(path)
    check_one_file(path, manifest, owner).close()
    for name in into.keys() | manifest.tensors.keys():
        entry, tensor = manifest.tensors.get(name), into.get(name)
        if entry is None or tensor is None or (entry.dtype, entry.shape) != (dtype_name(tensor.dtype), tensor.shape):
            raise CheckpointDamagedError(f"{path} and this rank differ about {name}")
    own = manifest.rank_tensors[0]
    with PieceFiles(path, manifest) as files, ThreadPoolExecutor(NUM_THREADS) as threads:
        jobs = []
        for name, entry in manifest.tensors.items():
            (piece,) = entry.pieces
            jobs.append(threads.submit(read_piece, files[piece.file], piece, entry.dtype, into[name]))
        random_states = {key.removeprefix(_RANDOM): load_tensor(files, key, own) for key in own}
        for job in jobs:
            job.result()
    return Copied(dict(manifest.extra), random_states, _hash_of(path))


def check_one_file(path: Path, manifest: Manifest, owner: int) -> PieceFile:
    """The opened file of a copy, size and header checked.

    Raises:
        CheckpointDamagedError: it is damaged, or the copy is not of one file.
    """
    if list(manifest.files) != [data_file(owner)] or len(manifest.rank_tensors) != 1:
        raise CheckpointDamagedError(f"{path} is no copy of what rank {owner} held")
    if any(len(entry.pieces) != 1 for entry in manifest.tensors.values()):
        raise CheckpointDamagedError(f"{path} has a tensor in pieces")
    entry: FileEntry = manifest.files[data_file(owner)]
    return PieceFile(path, data_file(owner), entry)


def _entry(key: str, tensor: torch.Tensor, file: str, digests: Mapping[str, str]) -> TensorEntry:
    shape = tuple(tensor.shape)
    piece = Piece(file, key, (0,) * tensor.ndim, shape, tensor.numel() * tensor.itemsize, digests[key])
    return TensorEntry(dtype_name(tensor.dtype), shape, (piece,))


def _hash_of(path: Path) -> str:
    """The hash of everything in the manifest of a copy, which is known to be right."""
    return str(json.loads((path / MANIFEST_NAME).read_bytes())["blake2b"])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
