"""Expert parallelism: which rank holds which experts, and the seams of mixture-of-experts layers under every layout.

The axis `ep` is carved out of the axes that share tokens out, `dp_shard` and `cp`: its ranks have different tokens and
different experts, and tokens travel. Ranks with the same experts shard them among themselves by FSDP (`expert_shard`).
With tensor parallelism each expert's hidden channels are cut like a dense layer's, or, with `ep_over_tp`, `ep` is
carved out of `tp` too: experts stay whole, and every rank dispatches its own share of the tokens.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..model.ffns.moe import MoE, MoEConfig, dispatch
from ..model.ffns.routing import first_of_chunk, of_chunk
from ..model.lm import HybridLM
from ..model.sequence import SequenceContext
from .comm import GatherTokens, token_share
from .config import ParallelConfig
from .context import SegmentedContext
from .dispatch import Dispatch, Plan, dispatch_cut, dispatch_over_ranks, plan_trip
from .halo import halos
from .mesh import Mesh
from .tensor import LocalParameters, View


def moe_layers(model: HybridLM) -> list[tuple[str, MoE]]:
    """The mixture-of-experts layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]


def shard_experts(model: HybridLM, mesh: Mesh) -> set[str]:
    """Share the experts out over `ep`, in place, and return the names of the parameters that are done with.

    Call on the meta device, before `shard_tensors`. Without such an axis experts are cut as other tensors are.
    """
    if mesh.experts is None:
        return set()
    axes = ("ep", "tp") if "tp" in (mesh.experts.mesh_dim_names or ()) and mesh.size("tp") > 1 else ("ep",)
    rules = model.shard_rules()
    done = set()
    for layer, moe in moe_layers(model):
        views: list[tuple[nn.Module, str, View]] = []
        for attribute, parameter in list(moe.experts.named_parameters()):
            name = f"{layer}.experts.{attribute}"
            dim = rules[name].dim
            assert dim is not None
            placements = [Shard(0), Shard(dim)][: len(axes)]
            cut = distribute_tensor(parameter.detach(), mesh.experts[axes], placements, src_data_rank=None)
            moe.experts.register_parameter(attribute, nn.Parameter(cut))
            views.append((moe.experts, attribute, partial(_expert_view, factor=mesh.expert_gradient_factor)))
            done.add(name)
        moe.experts.forward = LocalParameters(moe.experts.forward, views)  # type: ignore[method-assign]
    return done


def set_expert_seams(model: HybridLM, mesh: Mesh, config: ParallelConfig, plan: Plan = plan_trip) -> None:
    """Set what mixture-of-experts layers call where tokens or experts lie on several ranks, in place.

    `plan` says what is sent over `ep`; a dry run, in which routers decide nothing, has one of its own.

    torch.compile leaves them alone, as it does other messages.
    """
    for _, moe in moe_layers(model):
        moe.dispatch = torch.compiler.disable(_dispatch(mesh, plan))
        router = moe.router
        router.total = torch.compiler.disable(partial(_total, groups=_balance_groups(moe.config, mesh)))
        if mesh.size("tp") > 1:
            router.own = partial(token_share, group=mesh.group("tp"))
        if config.num_segments > 1 or mesh.size("tp") > 1:
            group = mesh.group("tp") if mesh.size("tp") > 1 else None
            router.of_chunk = torch.compiler.disable(partial(_of_chunk, group=group))


def _dispatch(mesh: Mesh, plan: Plan) -> Dispatch:
    inner: Dispatch = dispatch
    if mesh.size("ep") > 1:
        inner = partial(dispatch_over_ranks, group=mesh.group("ep"), plan=plan)
    cut = mesh.size("tp") > 1 and (mesh.experts is None or "tp" in (mesh.experts.mesh_dim_names or ()))
    return partial(dispatch_cut, group=mesh.group("tp"), inner=inner) if cut else inner


def _balance_groups(config: MoEConfig, mesh: Mesh) -> list[dist.ProcessGroup]:
    """The ranks whose tokens a balance is judged by: those that share rows, and for a batch those that have others."""
    axes = ("cp", "tp") if config.balance_scope == "row" else ("dp_replicate", "dp_shard", "cp", "tp")
    return [mesh.group(axis) for axis in axes if mesh.size(axis) > 1]


def _total(sums: Tensor, *, groups: list[dist.ProcessGroup]) -> Tensor:
    sums = sums.contiguous()
    for group in groups:
        dist.all_reduce(sums, group=group)
    return sums


def _of_chunk(
    logits_tX: Tensor, chunk: int, seq: SequenceContext, layer: int, *, group: dist.ProcessGroup | None
) -> Tensor:
    """The seam `of_chunk` where a chunk's first token may lie on another rank. Collective over `cp` and `tp`."""
    rows, length = seq.shape
    logits_TX = logits_tX if group is None else GatherTokens.apply(logits_tX, rows * length, group)
    if isinstance(seq, SegmentedContext):
        logits_BLX = logits_TX.view(rows, length, -1)
        lengths = seq.layout.lengths(seq.rank)
        before = halos(logits_BLX, seq, chunk - 1, 1, ("router", layer))
        parts = zip(before, logits_BLX.split(lengths, 1), _positions(seq, lengths, logits_TX.device), strict=True)
        firsts = [first_of_chunk(torch.cat([halo, own], 1), place, chunk) for halo, own, place in parts]
        logits_TX = torch.cat(firsts, 1).flatten(0, 1)
    else:
        logits_TX = of_chunk(logits_TX, chunk, seq, layer)
    return logits_TX if group is None else logits_TX[token_share(rows * length, group)]


def _positions(seq: SegmentedContext, lengths: list[int], device: torch.device) -> tuple[Tensor, ...]:
    return seq.position_BL(sum(lengths), device).split(lengths, 1)


def _expert_view(parameter: Tensor, factor: float) -> Tensor:
    """This rank's experts; the gradient is scaled so that FSDP's mean over fewer ranks is the mean over all."""
    assert isinstance(parameter, DTensor)
    return _ScaleGradient.apply(parameter.to_local(), factor)


class _ScaleGradient(torch.autograd.Function):
    """`apply(x, factor)`: `x`, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """`x`."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        """Scaled."""
        return dx * ctx.factor, None
