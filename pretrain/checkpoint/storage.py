"""The storage half of PyTorch's distributed checkpoint (DCP): its planner decides who writes and reads which box.

DCP's own storage pickles its metadata and writes in place. This one writes a JSON manifest and safetensors files into a
hidden folder and makes it visible by one rename.
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..checkpoint_files.folders import check_room, prune, publish, remove_stale, temporary_path
from ..checkpoint_files.manifest import (
    DTYPES,
    MANIFEST_NAME,
    CheckpointError,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    check_tiling,
    manifest_bytes,
    read_manifest,
)
from ..checkpoint_files.piece_file import NUM_THREADS, PieceFile, PieceFiles, drop_from_cache
from .pieces import Source, dtype_name, dtype_of, narrow, read_piece, write_pieces

# Separates a tensor's name from the offsets of a piece in the keys of a safetensors file.
_AT = "@"
_OWN = "rank."


@dataclass(frozen=True)
class _Report:
    """What one rank wrote, for the manifest."""

    file: str
    entry: FileEntry
    pieces: dict[str, list[Piece]]
    own: dict[str, TensorEntry]


class PiecePlanner(DefaultSavePlanner):
    """DCP's save planner for a flat dictionary of tensors, without the empty shards of ranks that hold no rows.

    The numbers come from `staged`, this rank's parts by name, where that is given.
    """

    def __init__(self, staged: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The numbers to be saved of the box at `index`."""
        return super().lookup_object(index) if self._staged is None else self._staged[index.fqn]

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes. Raises `ValueError` for what cannot be stored: no tensor, unknown dtype, clashing name."""
        plan = super().create_local_plan()
        for item in plan.items:
            _check_storable(item)
        # A global tensor without elements keeps its one empty piece, so that its shape is on record.
        self.plan = replace(plan, items=[i for i in plan.items if 0 not in _chunk(i).sizes or 0 in _size(i)])
        return self.plan


def load_planner() -> DefaultLoadPlanner:
    """DCP's load planner for a flat dictionary of tensors."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


class PieceWriter(StorageWriter):
    """Writes the checkpoint `path`: every rank its own file, the coordinator the folder, the manifest and the rename.

    `keep_last`, where given, is how many checkpoints stay; older ones go once every file of the new one has been read
    back from the disk and found good.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        extra: Mapping[str, Any],
        rank_tensors: Mapping[str, torch.Tensor],
        rank: int,
        keep_last: int | None,
    ) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        self._step = step
        self._extra = extra
        self._rank_tensors = rank_tensors
        self._rank = rank
        self._keep_last = keep_last

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: folders are the business of the coordinator, in `prepare_global_plan`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: clears away what interrupted saves left, and makes the hidden folder all write into."""
        json.dumps(self._extra, allow_nan=False)  # before anything is written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(self.path.parent)
        # Found out ahead of time, a full disk is not full for everything else that writes to it meanwhile.
        check_room(self.path.parent, sum(_num_bytes(item) for plan in plans for item in plan.items))
        self._temporary.mkdir()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file; verifies it when older checkpoints depend on that."""
        file = f"rank-{self._rank:05d}.safetensors"
        sources = [_source(item, planner) for item in plan.items]
        for name, tensor in self._rank_tensors.items():
            _check_dtype(name, tensor.dtype)
            sources.append(Source(_OWN + name, tensor.dtype, tuple(tensor.shape), partial(_same, tensor)))
        entry, digests = write_pieces(self._temporary / file, sources)
        pieces: dict[str, list[Piece]] = {}
        for item in plan.items:
            pieces.setdefault(item.index.fqn, []).append(_piece(item, file, digests))
        own = {
            name: TensorEntry(dtype_name(tensor.dtype), tuple(tensor.shape), (_own_piece(name, tensor, file, digests),))
            for name, tensor in self._rank_tensors.items()
        }
        if self._keep_last is not None:
            dtypes = {source.key: dtype_name(source.dtype) for source in sources}
            written = [*chain.from_iterable(pieces.values()), *chain.from_iterable(e.pieces for e in own.values())]
            self._verify(file, entry, [(piece, dtypes[piece.key]) for piece in written])
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(file), entry.bytes, _Report(file, entry, pieces, own))])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, once every rank has written: manifest, rename, and the removal of older checkpoints."""
        reports: list[_Report] = [result.storage_data for (result,) in results]
        for report in reports:
            if not (self._temporary / report.file).is_file():
                raise CheckpointError(
                    f"{report.file} is not visible to rank 0: {self.path.parent} is not a shared folder"
                )
        manifest = Manifest(
            step=self._step,
            files={report.file: report.entry for report in reports},
            tensors=_tensor_entries(metadata, reports),
            rank_tensors=tuple(report.own for report in reports),
            extra=self._extra,
        )
        with open(self._temporary / MANIFEST_NAME, "xb") as file:
            file.write(manifest_bytes(manifest))
            file.flush()
            os.fsync(file.fileno())
        read_manifest(self._temporary)  # what cannot be read back must not become visible, nor replace anything
        publish(self._temporary, self.path)
        if self._keep_last is not None:
            prune(self.path, self._keep_last)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: DCP never picks this storage by itself."""
        return False

    def _verify(self, file: str, entry: FileEntry, pieces: list[tuple[Piece, str]]) -> None:
        """Reads this rank's file back from the disk."""
        drop_from_cache(self._temporary / file)
        with PieceFile(self._temporary, file, entry) as opened, ThreadPoolExecutor(NUM_THREADS) as threads:
            for job in [threads.submit(opened.check, piece, dtype) for piece, dtype in pieces]:
                job.result()


class PieceReader(StorageReader):
    """Reads the boxes that DCP's load planner asks for, each piece once, every byte checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in DCP's words."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=dtype_of(entry.dtype)),
                    size=torch.Size(entry.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in entry.pieces],
                )
                for name, entry in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leaves the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills this rank's tensors in place, several pieces at a time."""
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
        for item in plan.items:
            offset = item.storage_index.offset
            assert offset is not None
            wanted.setdefault((item.storage_index.fqn, tuple(offset)), []).append(item)
        at = {(name, p.offsets): (p, e.dtype) for name, e in self._manifest.tensors.items() for p in e.pieces}
        with PieceFiles(self._path, self._manifest) as files, ThreadPoolExecutor(NUM_THREADS) as threads:
            jobs = [
                threads.submit(_fill, files[at[box][0].file], *at[box], items, planner)
                for box, items in sorted(wanted.items())
            ]
            for job in jobs:
                job.result()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: DCP never picks this storage by itself."""
        return False


def _fill(file: PieceFile, piece: Piece, dtype: str, items: list[ReadItem], planner: LoadPlanner) -> None:
    """Reads one piece and copies its boxes to their targets; straight into the target where it is the whole piece."""
    with torch.no_grad():
        targets = [planner.resolve_tensor(item).detach() for item in items]
        first = targets[0]
        if tuple(first.shape) == piece.sizes and first.is_contiguous() and first.device.type == "cpu":
            read_piece(file, piece, dtype, out=first)
            return
        data = read_piece(file, piece, dtype)
        for item, target in zip(items, targets, strict=True):
            target.copy_(narrow(data, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)


def _source(item: WriteItem, planner: SavePlanner) -> Source:
    assert item.tensor_data is not None
    shape = tuple(_chunk(item).sizes)
    return Source(_key(item), item.tensor_data.properties.dtype, shape, partial(_resolved, planner, item))


def _resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _piece(item: WriteItem, file: str, digests: Mapping[str, str]) -> Piece:
    key, offsets, sizes = _key(item), tuple(_chunk(item).offsets), tuple(_chunk(item).sizes)
    return Piece(file, key, offsets, sizes, _num_bytes(item), digests[key])


def _own_piece(name: str, tensor: torch.Tensor, file: str, digests: Mapping[str, str]) -> Piece:
    key, offsets = _OWN + name, (0,) * tensor.ndim
    return Piece(file, key, offsets, tuple(tensor.shape), tensor.numel() * tensor.itemsize, digests[key])


def _tensor_entries(metadata: Metadata, reports: list[_Report]) -> dict[str, TensorEntry]:
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        pieces = tuple(piece for report in reports for piece in report.pieces.get(name, []))
        shape = tuple(tensor.size)
        check_tiling(name, shape, pieces)
        entries[name] = TensorEntry(dtype_name(tensor.properties.dtype), shape, pieces)
    return entries


def _check_storable(item: WriteItem) -> None:
    name = item.index.fqn
    if item.tensor_data is None:
        raise ValueError(f"{name} is not a tensor; put plain values into `extra`")
    _check_dtype(name, item.tensor_data.properties.dtype)
    if _AT in name or name.startswith(_OWN) or name == "__metadata__":
        raise ValueError(f"tensor name {name!r} would clash with a checkpoint's own keys")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype_name(dtype) not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which a checkpoint cannot hold")


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(_chunk(item).sizes) * item.tensor_data.properties.dtype.itemsize


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _size(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.size


def _key(item: WriteItem) -> str:
    """The tensor's name; with the offsets behind it when the piece is not the whole tensor."""
    chunk = _chunk(item)
    if chunk.sizes == _size(item):
        return item.index.fqn
    return f"{item.index.fqn}{_AT}{','.join(map(str, chunk.offsets))}"
