"""How the matrices of a parameter are cut over ranks, and the few sums and gatherings that low-rank methods need.

Methods see every matrix lying down: S rows, the shorter side, and L columns, the longer one. Local tensors carry a
leading dimension X, the matrices of a stack (one for a plain matrix). Letters of a tensor's dimensions, small ones for
what this rank has of them:

| letter | dimension | ranks that cut the short side | ranks that cut the long side |
| --- | --- | --- | --- |
| s | short side of the parameter | as the parameter | - |
| l | long side of the parameter | - | as the parameter |
| r | rank, of a moment (r, l) | even stretches | - |
| r | rank, of a basis (s, r) | - | even stretches |

So neither moments nor bases are on two ranks unless the parameter is.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ....parallel.comm import GatherTokens, ScatterTokens, SumPartial, token_share

# What a tensor of the state is, which decides its whole shape and how it is cut.
Kind = Literal["whole", "basis", "moment", "scales", "columns", "ranks", "matrices"]
Side = Literal["short", "long"]
# The dimension of the state along which ranks cut it that cut a side of the parameter: in the same way, or in even
# stretches of the rank. Where there is none, they all have the same.
SAME: dict[tuple[Kind, Side], int] = {
    ("whole", "short"): 0,
    ("whole", "long"): 1,
    ("basis", "short"): 0,
    ("moment", "long"): 1,
    ("columns", "long"): 0,
}
STRETCHES: dict[tuple[Kind, Side], int] = {("basis", "long"): 1, ("moment", "short"): 0, ("scales", "short"): 0}
# Columns of a moment's row that share a scale where moments have 8 bits.
SCALE_COLUMNS = 256


@dataclass(frozen=True)
class _Cut:
    """Ranks over which one dimension is cut: the groups, outermost first."""

    groups: tuple[dist.ProcessGroup, ...]

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks, on each. Collective."""
        for group in self.groups:
            partial = SumPartial.apply(partial, group)
        return partial

    def scatter(self, partial: Tensor, dim: int) -> Tensor:
        """The sum over ranks, of which each keeps its stretch of `dim`. Collective."""
        if not self.groups:
            return partial
        moved = partial.movedim(dim, 0)
        rows = moved.flatten(1)
        for group in self.groups:
            rows = ScatterTokens.apply(rows, group)
        return rows.view(len(rows), *moved.shape[1:]).movedim(0, dim)

    def gather(self, own: Tensor, dim: int, size: int) -> Tensor:
        """All ranks' stretches of `dim`, `size` together. Collective."""
        if not self.groups:
            return own
        moved = own.movedim(dim, 0)
        rows = moved.flatten(1)
        for group, length in reversed(list(zip(self.groups, self._lengths(size), strict=True))):
            rows = GatherTokens.apply(rows, length, group)
        return rows.view(size, *moved.shape[1:]).movedim(0, dim)

    def stretch(self, size: int) -> slice:
        """Where this rank's part of a dimension of `size` lies."""
        start, length = 0, size
        for group in self.groups:
            part = token_share(length, group)
            start, length = start + part.start, part.stop - part.start
        return slice(start, start + length)

    def _lengths(self, size: int) -> list[int]:
        """What each group shares out."""
        lengths = []
        for group in self.groups:
            lengths.append(size)
            part = token_share(size, group)
            size = part.stop - part.start
        return lengths


class MatrixLayout:
    """Where this rank's part of a parameter's matrices lies. All methods that say so are collective over its mesh.

    Args:
        parameter: (rows, columns) or a stack (X, rows, columns), plain or DTensor, cut on any dimensions.

    Attributes:
        dtype: of state and of all that is computed, at least float32.
    """

    def __init__(self, parameter: Tensor) -> None:
        rows, columns = parameter.shape[-2:]
        self.lies_down = rows <= columns
        self.S, self.L = (rows, columns) if self.lies_down else (columns, rows)
        self.is_stack = parameter.ndim == 3
        self.X = parameter.shape[0] if self.is_stack else 1
        self.parameter = parameter.detach()
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        short, long = (-2, -1) if self.lies_down else (-1, -2)
        self._dims = {"short": parameter.ndim + short, "long": parameter.ndim + long}
        self.short, self.long = self._cut("short"), self._cut("long")
        self.own_short = self._places(self._dims["short"])
        self.own_long = self._places(self._dims["long"])
        self.own_stack = self._places(0) if self.is_stack else self.own_short.new_zeros(1)

    def lying(self, local: Tensor) -> Tensor:
        """This rank's part of the parameter or its gradient as `(x, s, l)`, sharing memory."""
        stacked = local if self.is_stack else local[None]
        return stacked if self.lies_down else stacked.mT

    def own(self, whole_XSl: Tensor) -> Tensor:
        """This rank's matrices and rows, `(x, s, ...)`, of `(X, S, ...)`."""
        return whole_XSl[self.own_stack][:, self.own_short]

    def own_rows(self, whole_xSk: Tensor) -> Tensor:
        """This rank's rows of what has all along dimension 1."""
        return whole_xSk[:, self.own_short]

    def own_rank(self, whole_xsR: Tensor) -> Tensor:
        """This rank's stretch of a basis' rank."""
        return whole_xsR[..., self.long.stretch(whole_xsR.shape[-1])]

    def whole_rank(self, own_xsr: Tensor, rank: int) -> Tensor:
        """A basis whole along the rank, its own rows still. Collective."""
        return self.long.gather(own_xsr, 2, rank)

    def whole_short(self, own_xsR: Tensor) -> Tensor:
        """All rows of what has this rank's along dimension 1. Collective."""
        if not self.short.groups:
            return own_xsR
        whole = own_xsR.new_zeros(own_xsR.shape[0], self.S, *own_xsR.shape[2:])
        return self.short.sum(whole.index_copy_(1, self.own_short, own_xsR))

    def sum_all(self, partial_x: Tensor) -> Tensor:
        """Numbers of each matrix summed over all parts of it. Collective."""
        return self.long.sum(self.short.sum(partial_x))

    def zeros(self, kind: Kind, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the state, this rank's part, on the parameter's device; of `dtype`, else of the layout's."""
        count, short, long = len(self.own_stack), len(self.own_short), len(self.own_long)
        rank_of_basis, rank_of_moment = self.long.stretch(rank), self.short.stretch(rank)
        shapes: dict[Kind, tuple[int, ...]] = {
            "whole": (count, short, long),
            "basis": (count, short, rank_of_basis.stop - rank_of_basis.start),
            "moment": (count, rank_of_moment.stop - rank_of_moment.start, long),
            "scales": (count, rank_of_moment.stop - rank_of_moment.start, -(-self.L // SCALE_COLUMNS)),
            "columns": (count, long),
            "ranks": (count, rank),
            "matrices": (count,),
        }
        local = self.parameter.to_local() if isinstance(self.parameter, DTensor) else self.parameter
        return local.new_zeros(shapes[kind], dtype=dtype or self.dtype)

    def as_whole(self, local: Tensor, kind: Kind, rank: int) -> Tensor:
        """`local`, made by `zeros`, as a tensor that knows its whole shape, sharing its memory."""
        shapes: dict[Kind, tuple[int, ...]] = {
            "whole": (self.S, self.L),
            "basis": (self.S, rank),
            "moment": (rank, self.L),
            "scales": (rank, -(-self.L // SCALE_COLUMNS)),
            "columns": (self.L,),
            "ranks": (rank,),
            "matrices": (),
        }
        mine = local if self.is_stack else local[0]
        if not isinstance(self.parameter, DTensor):
            return mine
        shape = (*((self.X,) if self.is_stack else ()), *shapes[kind])
        placements = [self._placement(placement, kind) for placement in self.parameter.placements]
        mesh, strides = self.parameter.device_mesh, [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        return DTensor.from_local(
            mine, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
        )

    def _placement(self, placement: Placement, kind: Kind) -> Placement:
        """How a tensor of the state lies on a mesh axis, on which the parameter lies as `placement`."""
        dim, first = _dim_of(placement), int(self.is_stack)
        if dim is None or (self.is_stack and dim == 0):
            return placement
        side: Side = "short" if dim == self._dims["short"] else "long"
        if (kind, side) in STRETCHES:
            return Shard(first + STRETCHES[kind, side])
        return _moved(placement, first + SAME[kind, side]) if (kind, side) in SAME else Replicate()

    def _cut(self, side: Side) -> _Cut:
        if not isinstance(self.parameter, DTensor):
            return _Cut(())
        mesh = self.parameter.device_mesh
        return _Cut(
            tuple(
                mesh.get_group(axis)
                for axis, placement in enumerate(self.parameter.placements)
                if _dim_of(placement) == self._dims[side] and mesh.size(axis) > 1
            )
        )

    def _places(self, dim: int) -> Tensor:
        """Which indices of a dimension this rank has, in its order."""
        places = torch.arange(self.parameter.shape[dim], device=self.parameter.device)
        if not isinstance(self.parameter, DTensor):
            return places
        placements = [_moved(p, 0) if _dim_of(p) == dim else Replicate() for p in self.parameter.placements]
        return distribute_tensor(places, self.parameter.device_mesh, placements, src_data_rank=None).to_local()


def _dim_of(placement: Placement) -> int | None:
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _moved(placement: Placement, dim: int) -> Placement:
    """The same cut of another dimension."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)
