"""AdamW with 8-bit moments (arXiv:2110.02861) on each rank's own part of every parameter."""

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ...kernels.adamw_8bit import BlockGrid, Moments, Rounding, Update, adamw_8bit_, block_maxima
from ...parallel.comm import largest_of_each
from .sharded import like_parameter, local_part


@dataclass(frozen=True)
class Cut:
    """How a parameter's last dimension lies over ranks, and so what its scales look like.

    Blocks are counted from the start of the whole parameter's rows. Where ranks cut between blocks, scales are cut with
    the parameter; where they cut inside one, each of them holds the scales of whole rows.
    """

    parameter: torch.Tensor
    block_size: int

    @property
    def width(self) -> int:
        """Columns of the whole parameter."""
        return self.parameter.shape[-1]

    @property
    def dims(self) -> list[int]:
        """Dimensions of the mesh that cut the columns."""
        if not isinstance(self.parameter, DTensor):
            return []
        last = self.parameter.ndim - 1
        return [i for i, p in enumerate(self.parameter.placements) if isinstance(p, Shard) and p.dim == last]

    @property
    def between_blocks(self) -> bool:
        """Whether no block lies on two ranks."""
        if not self.dims:
            return True
        parts = prod(self.parameter.device_mesh.size(dim) for dim in self.dims)  # type: ignore[attr-defined]
        return self.width % (parts * self.block_size) == 0

    def placements(self) -> tuple[Placement, ...]:
        """Where the scales lie."""
        assert isinstance(self.parameter, DTensor)
        shared = set() if self.between_blocks else set(self.dims)
        return tuple(Replicate() if i in shared else p for i, p in enumerate(self.parameter.placements))

    @cached_property
    def grid(self) -> BlockGrid:
        """The blocks of this rank's part."""
        whole = BlockGrid.whole(self.width, self.block_size)
        if not self.dims:
            return whole
        assert isinstance(self.parameter, DTensor)
        mesh = self.parameter.device_mesh
        first, columns = 0, self.width
        for dim in self.dims:
            share = -(-columns // mesh.size(dim))
            begin = min(mesh.get_local_rank(dim) * share, columns)
            first, columns = first + begin, min(share, columns - begin)
        column = 0 if self.between_blocks else first // self.block_size
        return BlockGrid(self.width, self.block_size, first, columns, column)

    def scales_like_parameter(self, scales: torch.Tensor) -> torch.Tensor:
        """This rank's scales (R, columns) as a tensor of the whole parameter's leading dimensions, sharing memory."""
        local = scales.view(*local_part(self.parameter).shape[:-1], scales.shape[-1])
        if not isinstance(self.parameter, DTensor):
            return local
        shape = torch.Size([*self.parameter.shape[:-1], -(-self.width // self.block_size)])
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.parameter.device_mesh
        return DTensor.from_local(local, mesh, self.placements(), run_check=False, shape=shape, stride=stride)

    def whole_rows(self) -> torch.Tensor:
        """The whole parameter's row (int64) that each row of this rank's part is."""
        leading = self.parameter.shape[:-1]
        device = local_part(self.parameter).device
        rows = torch.arange(prod(leading), device=device).view(leading)
        if isinstance(self.parameter, DTensor):
            over = [Replicate() if i in self.dims else p for i, p in enumerate(self.parameter.placements)]
            rows = distribute_tensor(rows, self.parameter.device_mesh, over, src_data_rank=None).to_local()
        return rows.flatten()


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter as rows, with its moments."""

    cut: Cut
    p_RC: torch.Tensor
    moments: Moments
    rounding: Rounding | None

    @property
    def grad(self) -> torch.Tensor:
        """The gradient's part `(R, C)`."""
        assert self.cut.parameter.grad is not None
        return local_part(self.cut.parameter.grad).reshape(self.p_RC.shape)


class AdamW8bit:
    """AdamW whose moments are codes of 8 bits, one scale for each block of a row of the whole parameter.

    A checkpoint loads on any layout with the same codes and scales. Collective in `step` only where ranks cut inside a
    block: these agree on its scales.

    Args:
        parameters: name to parameter of two or more dimensions, plain or DTensor.
        lr: peak learning rate.
        betas, eps, weight_decay: as AdamW's.
        block_size: columns of a block.
        rounding_seed: bfloat16 parameters are rounded stochastically by it; None: to the nearest.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Mapping[str, float],
        block_size: int = 256,
        rounding_seed: int | None = None,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay = {name: weight_decay[name] for name in parameters}
        self.parts = {name: _part(name, p, block_size, rounding_seed) for name, p in parameters.items()}
        device = next(iter(self.parts.values())).p_RC.device
        self.steps = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, lr_scale: float, skip: torch.Tensor) -> None:
        """See `Optimizer.step`."""
        self.steps += 1.0 - skip
        step = self.steps.clamp(min=1.0)
        updates = {
            name: Update(self.lr * lr_scale, *self.betas, self.eps, decay, step, skip)
            for name, decay in self.weight_decay.items()
        }
        maxima = self._maxima(updates)
        for name, part in self.parts.items():
            adamw_8bit_(
                part.p_RC,
                part.grad,
                part.moments,
                updates[name],
                grid=part.cut.grid,
                maxima=maxima.get(name),
                rounding=part.rounding,
            )

    def _maxima(self, updates: Mapping[str, Update]) -> dict[str, torch.Tensor]:
        """The new scales of parameters that are cut inside blocks; one message for each dimension of a mesh."""
        found = {}
        groups: dict[dist.ProcessGroup, list[torch.Tensor]] = defaultdict(list)
        for name, part in self.parts.items():
            if not part.cut.between_blocks:
                found[name] = block_maxima(part.grad, part.moments, updates[name], grid=part.cut.grid)
                assert isinstance(part.cut.parameter, DTensor)
                for dim in part.cut.dims:
                    groups[part.cut.parameter.device_mesh.get_group(dim)].append(found[name])
        for group, tensors in groups.items():
            largest_of_each(tensors, group)
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """See `Optimizer.state`; scales have a block where the parameter has its columns."""
        found = {}
        for name, part in self.parts.items():
            parameter, local = part.cut.parameter, local_part(part.cut.parameter)
            found[f"step.{name}"] = self.steps
            for slot, codes, scales in (
                ("exp_avg", part.moments.codes1, part.moments.scales1),
                ("exp_avg_sq", part.moments.codes2, part.moments.scales2),
            ):
                found[f"{slot}_codes.{name}"] = like_parameter(codes.view(local.shape), parameter)
                found[f"{slot}_scales.{name}"] = part.cut.scales_like_parameter(scales)
        return found


def _part(name: str, parameter: torch.Tensor, block_size: int, rounding_seed: int | None) -> Part:
    cut = Cut(parameter, block_size)
    local = local_part(parameter)
    p_RC = local.view(prod(local.shape[:-1]), local.shape[-1])
    blocks = cut.grid.num_blocks if cut.between_blocks else -(-cut.width // block_size)
    rounding = None
    if rounding_seed is not None and local.dtype == torch.bfloat16:
        seed = zlib.crc32(f"{rounding_seed} {name}".encode()) >> 1
        rounding = Rounding(seed, cut.whole_rows())
    return Part(cut, p_RC, Moments.zeros(len(p_RC), cut.grid.columns, blocks, local.device), rounding)
