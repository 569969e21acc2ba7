"""The process groups of a mesh."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from headrace.parallel.config import ParallelConfig
from headrace.parallel.mesh import build_mesh
from tiny import this_world


def wait_for_nobody(config: ParallelConfig) -> str:
    """What rank 0 meets in a collective over `tp` to which no other rank comes before it has given up."""
    group = build_mesh(config, this_world()).group("tp")
    if dist.get_rank() > 0:
        time.sleep(3 * config.timeout_s)
        return ""
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(1), group=group)
    return str(caught.value)


def test_every_axis_has_the_timeout(gloo: Callable) -> None:
    """Groups of a mesh have PyTorch's own unless told."""
    config = ParallelConfig(tp=2, dp_shard=2, timeout_s=1.0)
    assert "1000ms" in gloo(4, wait_for_nobody, config)[0]
