"""One rank of any number, played by one process: the real code runs, nothing is sent, and tensors have no memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.ffns.moe import MoEConfig
from .config import ParallelConfig
from .dispatch import Trip
from .mesh import Mesh, World, build_mesh
from .traffic import Sent


@dataclass(frozen=True)
class FakeWorld:
    """What one rank of a run sees.

    Attributes:
        world, mesh: as the run builds them.
        mode: makes tensors that have no memory.
    """

    world: World
    mesh: Mesh
    mode: FakeTensorMode

    @contextmanager
    def tensors(self) -> Iterator[None]:
        """Tensors made within have no memory; a number that the host asks of one is 1."""
        with self.mode, _NumbersAreOne():
            yield


@contextmanager
def fake_world(config: ParallelConfig, rank: int, size: int) -> Iterator[FakeWorld]:
    """What rank `rank` of `size` sees. No process group may exist before.

    Raises:
        UserError: the degrees do not fit the number of processes.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        world = World(rank, size, torch.device("cpu"))
        # Parameters begin on the meta device, which to the mode is not fake.
        yield FakeWorld(world, build_mesh(config, world), FakeTensorMode(allow_non_fake_inputs=True))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # what DTensor remembers names groups that are gone


class _NumbersAreOne(TorchDispatchMode):
    """Numbers, which fake tensors do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        return func(*args, **(kwargs or {}))


def passes_of_step(sent: list[Sent], num_micro_batches: int) -> Counter[Sent]:
    """What all micro-batches of a step send, from a record of the last two of them (of the only one, if it is one).

    Micro-batches before the last are alike: they send all but the reduction of gradients.
    """
    turns = ((a.phase, b.phase) for a, b in pairwise(sent))
    second = next((i + 1 for i, turn in enumerate(turns) if turn == ("backward", "forward")), 0)
    first = Counter(entry for entry in sent[:second] if entry.phase != "between")
    total = Counter(sent)
    for entry, times in first.items():
        total[entry] += times * (num_micro_batches - 2)
    return total


def plan_even_trip(experts_Tk: Tensor, own: int, group: dist.ProcessGroup, *, config: MoEConfig) -> tuple[Tensor, Trip]:
    """As `dispatch.plan_trip` where tokens choose at random, all experts alike, and all ranks have as many. Collective.

    Fake tensors hold no decisions; each rank is sent as many tokens as are then expected to need it.
    """
    (tokens, top_k), ranks, here = experts_Tk.shape, dist.get_world_size(group), dist.get_rank(group)
    counts = [round(tokens * share_that_needs(config, range(rank * own, (rank + 1) * own))) for rank in range(ranks)]
    told_R2 = experts_Tk.new_empty(ranks, 2)
    dist.all_to_all_single(torch.empty_like(told_R2), told_R2, group=group)
    return experts_Tk.new_empty(tokens, ranks), Trip(counts, [counts[here]] * ranks, tokens * top_k, group)


def share_that_needs(config: MoEConfig, experts: range) -> float:
    """Share of tokens that go to at least one of these experts, where all choices that a router can make are alike."""
    in_group = config.num_experts // config.num_groups
    # How many ways there are to choose groups, by their number and that of the experts in question in them.
    ways = Counter({(0, 0): 1})
    for group in range(config.num_groups):
        there = sum(expert // in_group == group for expert in experts)
        for (chosen, held), count in list(ways.items()):
            ways[chosen + 1, held + there] += count
    offered = in_group * config.top_groups
    of_groups = {held: count for (chosen, held), count in ways.items() if chosen == config.top_groups}
    spared = sum(count * comb(offered - held, config.top_k) for held, count in of_groups.items())
    return 1 - spared / (sum(of_groups.values()) * comb(offered, config.top_k))
