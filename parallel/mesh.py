"""Start the process group and name the axes of the mesh."""

import logging
import os
import platform
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..errors import UserError
from ..kernels.memory import keep_freed_memory
from ..kernels.products import prefer_onednn
from .config import ParallelConfig
from .environment import read_number
from .join import join_group


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: from 0.
        size: number of processes.
        device: of this one.
        began_s: when it began, seconds since 1970.
        start: name of this start, where a launcher keeps a store over several.
    """

    rank: int
    size: int
    device: torch.device
    began_s: float = field(default_factory=time.time)
    start: str = ""

    @property
    def is_first(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0


def start_world(timeout_s: float = 600.0) -> World:
    """Join the process group torchrun describes in the environment; alone, start a group of one.

    Uses NCCL (with gloo for CPU tensors) where CUDA is at hand, else gloo, and then the faster library for matrix
    products. Allows this process as many open files as the system lets it have. Collective over all processes.

    Raises:
        UserError: LOCAL_RANK is no number, there are more processes on this machine than GPUs, or as `join_group`.
    """
    local_rank = read_number("LOCAL_RANK", 0)
    _allow_open_files()
    if torch.cuda.is_available():
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"process {local_rank + 1} on this machine has no GPU: there are {gpus}; start {gpus} at most"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        prefer_onednn()
        keep_freed_memory()
    start = ""
    if "RANK" in os.environ:
        start = join_group(backend, timeout_s)
    else:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, process_began_s(), start)


def _allow_open_files() -> None:
    """A group by gloo costs a descriptor for each other process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def process_began_s() -> float:
    """When the system started this process, in seconds since 1970; where it does not tell (not Linux), now."""
    try:
        # Fields are counted from behind the name, which may hold anything.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Mesh:
    """The axes of a run, and this process's place on them.

    Attributes:
        dense: `(pp, dp_replicate, fsdp, tp)`, where `fsdp` is `dp_shard` and `cp` together: parameters live here.
        tokens: `(pp, dp_replicate, dp_shard, cp, tp)`, the same processes in the same order: tokens live here.
        cp_on_one_machine: whether this process's `cp` group lies on one machine; the same for all its ranks.
        experts: `(pp, dp_replicate, expert_shard, ep, tp)`, or without `tp` where that is part of `ep`; the same
            processes in the same order: experts live here. None where they are no different from other parameters.
    """

    dense: DeviceMesh
    tokens: DeviceMesh
    cp_on_one_machine: bool
    experts: DeviceMesh | None = None

    def size(self, axis: str) -> int:
        """The degree of an axis."""
        if axis == "ep" and self.experts is None:
            return 1
        mesh = self._with(axis)
        return mesh.size(_axes(mesh).index(axis))

    def rank(self, axis: str) -> int:
        """This process's coordinate on an axis."""
        return self._with(axis).get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one on an axis alone."""
        return self._with(axis).get_group(axis)

    @property
    def degrees(self) -> dict[str, int]:
        """The degree of each axis by name."""
        return dict(zip(_axes(self.tokens), self.tokens.shape, strict=True))

    @property
    def fsdp(self) -> DeviceMesh:
        """What parameters are sharded over, and, with more than one replica, replicated over first."""
        return self.dense["dp_replicate", "fsdp"] if self.size("dp_replicate") > 1 else self.dense["fsdp"]

    @property
    def tp(self) -> DeviceMesh:
        """The tensor-parallel axis as a mesh of its own."""
        return self.dense["tp"]

    @property
    def expert_fsdp(self) -> DeviceMesh | None:
        """What experts are sharded over, and replicated over first, as `fsdp`; None where `fsdp` holds for them."""
        if self.experts is None:
            return None
        replicated = self.size("dp_replicate") > 1
        return self.experts["dp_replicate", "expert_shard"] if replicated else self.experts["expert_shard"]

    @property
    def expert_gradient_factor(self) -> float:
        """Ranks over which FSDP averages an expert's gradient, per rank over which others' are averaged."""
        assert self.experts is not None
        return self.size("dp_replicate") * self.size("expert_shard") / self.grad_ranks

    @property
    def data_ranks(self) -> int:
        """Different shares of a batch."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def data_rank(self) -> int:
        """Which share of a batch this process works on."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def grad_ranks(self) -> int:
        """Processes over which the gradient of a parameter is averaged."""
        return self.data_ranks * self.size("cp")

    def _with(self, axis: str) -> DeviceMesh:
        # An axis of several is asked for on one of them: two groups of the same processes would be two communicators.
        if self.experts is not None and axis in ("ep", "expert_shard"):
            return self.experts
        return self.dense if axis in _axes(self.dense) else self.tokens


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    assert mesh.mesh_dim_names is not None
    return mesh.mesh_dim_names


def build_mesh(config: ParallelConfig, world: World) -> Mesh:
    """The mesh of a run. Collective.

    Raises:
        UserError: the degrees do not fit the number of processes.
    """
    if problems := config.problems(world.size):
        raise UserError("; ".join(problems), everywhere=True)
    # A parameter cut over tp and then by FSDP is put together in two steps: that is meant, and needs no warning.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    shard = config.shard_degree(world.size)
    dense = {"pp": config.pp, "dp_replicate": config.dp_replicate, "fsdp": shard * config.cp, "tp": config.tp}
    tokens = {"pp": config.pp, "dp_replicate": config.dp_replicate, "dp_shard": shard, "cp": config.cp, "tp": config.tp}

    def build(degrees: dict[str, int]) -> DeviceMesh:
        mesh = init_device_mesh(world.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        if dist.get_backend() != "fake":
            for group in mesh.get_all_groups():  # else a backend's own, up to half an hour
                _set_pg_timeout(timedelta(seconds=config.timeout_s), group)
        return mesh

    dense_mesh, tokens_mesh = build(dense), build(tokens)
    experts_mesh = None
    if config.ep > 1 or (config.ep_over_tp and config.tp > 1):
        spread = shard * config.cp * (config.tp if config.ep_over_tp else 1)
        experts = {"pp": config.pp, "dp_replicate": config.dp_replicate, "expert_shard": spread // config.ep}
        experts["ep"] = config.ep
        experts_mesh = build(experts if config.ep_over_tp else experts | {"tp": config.tp})
    group = dist.get_process_group_ranks(tokens_mesh.get_group("cp"))
    machines = _machines(world)
    return Mesh(dense_mesh, tokens_mesh, len({machines[rank] for rank in group}) == 1, experts_mesh)


def _machines(world: World) -> list[str]:
    """The machine of every process; with a `fake` process group, as if each had LOCAL_WORLD_SIZE processes, or 8."""
    if dist.get_backend() == "fake":
        share = read_number("LOCAL_WORLD_SIZE", 8, least=1)
        return [str(rank // share) for rank in range(world.size)]
    machines = [""] * world.size
    dist.all_gather_object(machines, platform.node())
    return machines
