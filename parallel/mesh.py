"""Start the process group and name the axes of the mesh."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UserError
from ..kernels.memory import keep_freed_memory
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
    """Join the process group torchrun describes in the environment; alone, start a group of one.

    Uses NCCL (with gloo for CPU tensors) where CUDA is at hand, else gloo, and then the faster library for matrix
    products. Collective over all processes.

    Raises:
        UserError: more processes on this machine than it has GPUs, or an environment that describes half a group.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
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
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(
                f"RANK is set but {', '.join(missing)} is not; start with torchrun or --nproc, or unset RANK"
            )
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
