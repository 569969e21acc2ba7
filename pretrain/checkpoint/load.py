"""Loading a checkpoint into any layout, and reading one without a process group."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ..checkpoint_files.folders import offering_previous
from ..checkpoint_files.manifest import CheckpointError, Manifest, read_manifest
from ..checkpoint_files.piece_file import PieceFiles
from .pieces import dtype_of, load_tensor
from .save import one_error, quiet_single_process
from .storage import PieceReader, load_planner

T = TypeVar("T")


def load_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, offer: bool = True) -> None:
    """Fills `tensors` in place from the checkpoint `path`, whatever layout it was saved in.

    Collective over the default group; works in one process without a group. `tensors` has the same names on every rank,
    DTensors of any layout or plain tensors; tensors of the checkpoint that are not named are left out. Each rank reads
    only the pieces it needs and checks their hashes.

    Raises `CheckpointError`, the same on every rank: a tensor is missing from the checkpoint or has another shape or
    dtype, the folder is no checkpoint or of a newer format, or (`CheckpointDamagedError`, which with `offer` names the
    previous good checkpoint) something is missing or altered. Some of `tensors` may have been filled by then.
    """
    path = Path(path)
    with _offering(path, offer):
        manifest = _on_all_ranks(lambda: _matching_manifest(path, tensors))
        with one_error(f"checkpoint {path} cannot be loaded"), quiet_single_process():
            dcp.load(dict(tensors), storage_reader=PieceReader(path, manifest), planner=load_planner())


def load_full(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors `names` (default: all) of a checkpoint, whole, on the CPU, every byte checked.

    Not collective: one process reads everything. Raises `CheckpointError` as `load_checkpoint` does.
    """
    path = Path(path)
    with offering_previous(path):
        manifest = read_manifest(path)
        chosen = list(manifest.tensors if names is None else names)
        missing = [name for name in chosen if name not in manifest.tensors]
        if missing:
            raise CheckpointError(_missing(path, missing))
        with PieceFiles(path, manifest) as files:
            return {name: load_tensor(files, name, manifest.tensors) for name in chosen}


def read_extra(path: str | os.PathLike[str], *, offer: bool = True) -> dict[str, Any]:
    """The `extra` that the checkpoint was saved with. Not collective; raises as `load_checkpoint` does."""
    path = Path(path)
    with _offering(path, offer):
        return dict(read_manifest(path).extra)


def read_rank_tensors(path: str | os.PathLike[str], rank: int, *, offer: bool = True) -> dict[str, torch.Tensor] | None:
    """The tensors that `rank` saved as its own, on the CPU, or None where the checkpoint had no such rank.

    Not collective. Raises `CheckpointError` as `load_checkpoint` does.
    """
    path = Path(path)
    with _offering(path, offer):
        manifest = read_manifest(path)
        if rank >= len(manifest.rank_tensors):
            return None
        own = manifest.rank_tensors[rank]
        with PieceFiles(path, manifest) as files:
            return {name: load_tensor(files, name, own) for name in own}


def _offering(path: Path, offer: bool) -> AbstractContextManager[None]:
    return offering_previous(path) if offer else nullcontext()


def _matching_manifest(path: Path, tensors: Mapping[str, torch.Tensor]) -> Manifest:
    """The manifest, once it is known to have what `tensors` want."""
    manifest = read_manifest(path)
    missing = [name for name in tensors if name not in manifest.tensors]
    if missing:
        raise CheckpointError(_missing(path, missing))
    for name, tensor in tensors.items():
        saved = manifest.tensors[name]
        if saved.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"checkpoint {path}: {name} was saved with shape {list(saved.shape)}, wanted {list(tensor.shape)}: "
                "resume with the model it was saved from"
            )
        if dtype_of(saved.dtype) != tensor.dtype:
            raise CheckpointError(
                f"checkpoint {path}: {name} was saved as {dtype_of(saved.dtype)}, wanted {tensor.dtype}"
            )
    return manifest


def _missing(path: Path, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"checkpoint {path} has no tensor {names[0]}{more}: it was saved from another model or optimizer"


def _on_all_ranks(action: Callable[[], T]) -> T:
    """`action()`, or on every rank the error of the lowest rank on which it failed."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    errors: list[Exception | None] = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first
    assert result is not None
    return result
