"""Checks between processes: whether their clocks agree, and how fast they reach each other on each axis of the mesh."""

import statistics
import time
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.config import ParallelConfig
from ..parallel.heartbeat import name_ranks
from ..parallel.mesh import World, build_mesh
from .findings import Finding

T = TypeVar("T")
APART_S = 1.0
CLOCK_ROUNDS = 5
LATENCY_ROUNDS, BANDWIDTH_ROUNDS = 20, 5
# Large enough to fill a connection, small enough for a second on the slowest: GPUs, CPUs.
GPU_BYTES, CPU_BYTES = 64 << 20, 4 << 20


def gather(mine: T) -> list[T]:
    """What every rank has, in rank order. Collective."""
    found: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def check_clocks(hosts: Sequence[str], now_s: float | None = None) -> list[Finding]:
    """Whether the clocks of all ranks agree within a second; the same on all. Collective.

    A rank that comes late out of the barrier seems late: the round with the least spread counts.

    Args:
        hosts: of each rank.
        now_s: this rank's time instead of the clock's.
    """
    if len(hosts) == 1:
        return []
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        rounds.append(gather(time.time() if now_s is None else now_s))
    times = min(rounds, key=lambda found: max(found) - min(found))
    middle = statistics.median(times)
    apart = max(times) - min(times)
    if apart <= APART_S:
        return [Finding("clocks", "ok", f"those of all ranks agree within {apart:.3f} s")]
    off = {rank: hosts[rank] for rank, found in enumerate(times) if abs(found - middle) > APART_S / 2}
    words = f"those of {name_ranks(off)} are {apart:,.1f} s apart from the others'; set them (chrony, ntpd)"
    return [Finding("clocks", "FAIL", words)]


def check_network(config: ParallelConfig, world: World) -> list[Finding]:
    """Latency and bandwidth of an all-reduce on each axis, in all its groups at once; the same on all. Collective."""
    if world.size == 1:
        return [Finding("network", "ok", "one process: nothing is sent")]
    mesh = build_mesh(config, world)
    axes = [*(axis for axis, degree in mesh.degrees.items() if degree > 1), *(["ep"] if mesh.size("ep") > 1 else [])]
    return [_measure(axis, mesh.group(axis), world.device) for axis in axes]


def _measure(axis: str, group: dist.ProcessGroup, device: torch.device) -> Finding:
    """The figures of the slowest rank."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    short, long = (torch.ones(count, device=device) for count in (2, size // 4))
    for tensor in (short, long):  # the first connects
        _reduce(tensor, group)
    ranks = dist.get_world_size(group)
    short_s = statistics.median(_timed(short, group) for _ in range(LATENCY_ROUNDS))
    long_s = statistics.median(_timed(long, group) for _ in range(BANDWIDTH_ROUNDS))
    check = torch.full((), dist.get_rank(group) + 1.0, device=device)
    dist.all_reduce(check, group=group)
    wrong = torch.tensor(float(check != ranks * (ranks + 1) / 2))
    figures = torch.stack([torch.tensor(short_s), torch.tensor(long_s), wrong])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    short_s, long_s, is_wrong = figures.tolist()
    if is_wrong:
        return Finding(f"network {axis}", "FAIL", f"an all-reduce over {ranks} ranks gave a wrong sum")
    backend = dist.get_backend(group)
    text = f"all-reduce of {ranks} ranks by {backend}: {short_s * 1e6:,.0f} us, {size / long_s / 1e9:.2f} GB/s"
    return Finding(f"network {axis}", "ok", f"{text} ({size >> 20} MiB in {long_s * 1e3:.1f} ms)")


def _reduce(tensor: Tensor, group: dist.ProcessGroup) -> None:
    tensor.fill_(1.0)
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _timed(tensor: Tensor, group: dist.ProcessGroup) -> float:
    """Seconds of one all-reduce."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    tensor.fill_(1.0)
    return elapsed
