"""The worker pool itself: results, failures, deaths and hangs."""

import gc
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from gloo_pool import MAX_THREADS, GlooPool, WorkerError


@dataclass
class Payload:
    value: torch.Tensor


def _sum_ranks(payload: Payload) -> Payload:
    total = payload.value + dist.get_rank()
    dist.all_reduce(total)
    return Payload(total)


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ZeroDivisionError("the marker text")
    dist.barrier()


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def _pid() -> int:
    assert torch.get_num_threads() == 1
    return os.getpid()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_runs_on_every_rank_and_keeps_its_workers(gloo):
    results = gloo(3, _sum_ranks, Payload(torch.ones(2)))
    assert [result.value.tolist() for result in results] == [[6.0, 6.0]] * 3
    assert gloo(2, _pid) == gloo(3, _pid)[:2]


def test_failures_name_the_rank_and_leave_the_pool_usable(gloo):
    with pytest.raises(WorkerError, match=r"rank 1 of 2 in _fail_on[\s\S]*the marker text"):
        gloo(2, _fail_on, 1)
    with pytest.raises(WorkerError, match=r"rank 0[\s\S]*exit status 7"):
        gloo(2, _die_on, 0)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1[\s\S]*did not finish"):
        gloo(2, _hang_on, 1, timeout_s=1.0)
    assert time.monotonic() - started < 20
    assert len(gloo(2, _pid)) == 2


def call_for(seconds: float, gloo: Callable) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        gloo(1, _pid)


def test_a_worker_that_dies_between_calls_fails_one_call(gloo: Callable) -> None:
    victim = gloo(2, _pid)[1]
    os.kill(victim, signal.SIGUSR1)
    with pytest.raises(WorkerError, match=rf"exit status by rank: .*1: -{signal.SIGUSR1:d}"):
        call_for(30.0, gloo)  # its threads take a moment to end
    assert victim not in gloo(2, _pid)


def test_close_leaves_no_process():
    pool = GlooPool()
    pids = pool.run(2, _pid)
    pool.close()
    assert not any(_alive(pid) for pid in pids)


def make_groups_in_a_cycle() -> int:
    """Groups that only a collection of cycles frees, as those of sharded models; the threads of this process."""
    holder: list = [dist.new_group() for _ in range(4)]
    holder.append(holder)
    return len(os.listdir("/proc/self/task"))


def test_groups_of_earlier_calls_take_their_threads_with_them(gloo: Callable) -> None:
    counts = [max(gloo(2, make_groups_in_a_cycle)) for _ in range(16)]
    assert max(counts) <= MAX_THREADS + counts[0] + 32


def threads_with_a_mesh(rows: int) -> int:
    """Threads of this process, once what earlier calls left is collected and a tensor has been spread and gathered."""
    gc.collect()
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    spread = distribute_tensor(torch.ones(rows, 4), mesh, [Replicate(), Shard(0)])
    assert spread.redistribute(placements=[Replicate(), Replicate()]).to_local().sum() == 4 * rows
    return len(os.listdir("/proc/self/task"))


def test_what_dtensor_keeps_does_not_keep_groups_of_earlier_calls(gloo: Callable) -> None:
    new, *counts = [max(gloo(2, threads_with_a_mesh, rows)) for rows in (2, 4, 6, 8, 10)]
    assert max(counts) <= counts[0], (new, counts)
