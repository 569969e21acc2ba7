"""The norm of a sharded gradient, and clipping by it."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def global_norm(gradients: Iterable[torch.Tensor], stages: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The Euclidean norm of all gradients together, a float32 scalar, the same on every rank.

    One all-reduce for each set of mesh axes that gradients are sharded over, and one over the pipeline's `stages`,
    which hold different parameters; no host synchronisation. Collective.
    """
    groups: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for gradient in gradients:
        axes: tuple = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            axes = tuple(mesh.get_group(axis) for axis, p in enumerate(gradient.placements) if not p.is_replicate())
            gradient = gradient.to_local()
        groups[axes].append(gradient)
    squares = []
    for axes, parts in groups.items():
        square = torch.stack([norm.float() for norm in _norms(parts)]).square().sum()
        for group in axes:
            dist.all_reduce(square, group=group)
        squares.append(square)
    total = torch.stack(squares).sum()
    if stages is not None and dist.get_world_size(stages) > 1:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def _norms(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each, summed in float32 or float64."""
    narrow = [part for part in parts if part.dtype not in (torch.float32, torch.float64)]
    wide = [part for part in parts if part.dtype in (torch.float32, torch.float64)]
    found = list(torch._foreach_norm(wide)) if wide else []
    return found + (list(torch._foreach_norm(narrow, 2, dtype=torch.float32)) if narrow else [])


def clip_gradients(
    gradients: Iterable[torch.Tensor],
    max_norm: float,
    *,
    copies: Iterable[torch.Tensor] = (),
    stages: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Scale all gradients by one factor so that their global norm is at most `max_norm` (0: leave them). Collective.

    Args:
        gradients: of this process's parameters.
        max_norm: of all gradients together.
        copies: gradients that another stage counts; they are scaled too.
        stages: as in `global_norm`.

    Returns:
        The norm before clipping. Where it is not finite, so are the gradients: skip the update.
    """
    gradients = list(gradients)
    norm = global_norm(gradients, stages)
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in [*gradients, *copies]], factor)
    return norm
