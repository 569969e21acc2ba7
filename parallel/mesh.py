"""Start the process group and name the axes of the mesh."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UserError
from ..kernels.products import prefer_onednn
from .config import ParallelConfig


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0


def start_world(timeout_s: float = 600.0) -> World:
    """Join the process group torchrun or srun describes in the environment; alone, start a group of one.

    Uses NCCL (with gloo for CPU tensors) where CUDA is at hand, else gloo, and then the faster library for matrix
    products. Collective over all processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        prefer_onednn()
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device)


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """The mesh `(dp_replicate, dp_shard)`, or `(dp_shard,)` when nothing is replicated. Collective.

    Raises:
        UserError: the degrees do not fit the number of processes.
    """
    if problems := config.problems(world.size):
        raise UserError("; ".join(problems), everywhere=True)
    shard = config.shard_degree(world.size)
    if config.dp_replicate == 1:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        world.device.type, (config.dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
