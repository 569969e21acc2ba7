"""Shard a model over the data axes (FSDP2) and fill it with its initial values."""

import warnings
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..model.ffns.moe import Experts
from ..model.lm import HybridLM
from .config import ParallelConfig


def shard_model(
    model: HybridLM,
    mesh: DeviceMesh,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    *,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard every block, then what is left (embedding, last norm, head), over `mesh`, in place.

    With `expert_mesh`, experts are groups of their own over that: the ranks that hold the same ones.

    Parameters stay float32; with another `compute_dtype` each gather casts them, gradients are reduced in float32,
    and submodules that say `keep_fp32` are gathered uncast as a group of their own.
    """
    # Blocks may return views; nothing writes to them in place, which is what FSDP warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mixed = compute_dtype != torch.float32
    # The model itself casts to its weights' dtype where a layer begins, so that the residual stream may stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        cast_forward_inputs=False,
    )
    uncast = MixedPrecisionPolicy(cast_forward_inputs=False)
    reshard = config.reshard_after_forward
    for block in model.layers.values():
        for module in block.modules():
            if mixed and getattr(module, "keep_fp32", False):
                # So few that gathering them twice costs more than keeping them.
                fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=uncast)
            if expert_mesh is not None and isinstance(module, Experts):
                place = partial(_placement, ranks=expert_mesh.size(-1))
                fully_shard(
                    module, mesh=expert_mesh, reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=place
                )
        place = partial(_placement, ranks=mesh.size(-1))
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=place)
    _prefetch(list(model.layers.values()))
    # The root's parameters are needed from the first operation to the last: gathering them twice gains nothing.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def _placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Where FSDP cuts a stack of experts' matrices when there are not enough experts for all ranks; None: dimension 0.

    Along the model's width, which tensor parallelism leaves whole. FSDP cuts no other dimension than 0 unevenly.
    """
    if parameter.ndim != 3:
        return None
    cut = set()
    local = parameter.detach()
    if isinstance(local, DTensor):
        cut = {placement.dim for placement in local.placements if isinstance(placement, Shard)}
        local = local.to_local()
    if local.shape[0] % ranks == 0:
        return None
    return next((Shard(dim) for dim in (1, 2) if dim not in cut and local.shape[dim] % ranks == 0), None)


def _prefetch(blocks: list[nn.Module]) -> None:
    """Gather each block's parameters while the one before it computes, forward and backward."""
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        # Small groups first: they would wait behind the block's where they are needed at once. Experts come last.
        groups: list[FSDPModule] = [m for m in following.modules() if isinstance(m, FSDPModule)]
        ordered = sorted(groups, key=lambda m: (isinstance(m, Experts), m is following))
        block.set_modules_to_forward_prefetch(ordered)
        following.set_modules_to_backward_prefetch([block])


def materialise(model: HybridLM, device: torch.device, seed: int) -> None:
    """Give a model built on the meta device its memory and its initial values, the same under every layout.

    Every rank computes each full tensor and keeps its part, one tensor at a time; nothing is sent.

    Raises:
        RuntimeError: a parameter or buffer has no initial value.
    """
    model.to_empty(device=device)
    pending = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, full in model.initial_values(seed):
        fill(pending.pop(name), full)
    if pending:
        raise RuntimeError(f"no initial value for {', '.join(pending)}")


def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Write this rank's part of `whole`, which every rank has, into a parameter. Nothing is sent."""
    target = parameter.detach()
    whole = whole.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
        target = target.to_local()
    target.copy_(whole)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the coming backward passes reduce gradients over the data axes, or only add them up locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)
