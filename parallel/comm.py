"""Collectives that the rest of the package calls by meaning, not by name."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `values` over all processes, in place. Collective, no host synchronisation."""
    dist.all_reduce(values)
    return values


def do_together(action: Callable[[], T]) -> T:
    """`action()` on every process; what any of them met is raised on all, so that none waits for one that left.

    Collective. `action` itself must not be, unless it fails on every process or on none.

    Raises:
        UserError: the message of the lowest rank that met one, or could not read or write a file.
    """
    error: Exception | None = None
    try:
        result = action()
    except (UserError, OSError) as met:
        error = met
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(error) if error else None)
    if first := next(filter(None, messages), None):
        raise UserError(first, everywhere=True) from error
    return result


def gather_stack(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's `(n, ...)` stack, joined along the first dim in rank order. Collective over `group`."""
    joined = mine.new_empty(mine.shape[0] * dist.get_world_size(group), *mine.shape[1:])
    _all_gather(joined, mine.contiguous(), group=group)
    return joined
