"""Collectives that the rest of the package calls by meaning, not by name."""

import torch
import torch.distributed as dist

from ..errors import UserError

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `values` over all processes, in place. Collective, no host synchronisation."""
    dist.all_reduce(values)
    return values


def from_first_rank(value: object) -> object:
    """Rank 0's `value` on every process. Collective; `value` must be small."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(error: UserError | None) -> None:
    """Raise on every process what any of them met, so that none waits for one that has left. Collective.

    Raises:
        UserError: the message of the lowest rank that has one.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(error) if error else None)
    for message in messages:
        if message is not None:
            raise UserError(message, everywhere=True)


def gather_stack(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's `(n, ...)` stack, joined along the first dim in rank order. Collective over `group`."""
    joined = mine.new_empty(mine.shape[0] * dist.get_world_size(group), *mine.shape[1:])
    _all_gather(joined, mine.contiguous(), group=group)
    return joined
