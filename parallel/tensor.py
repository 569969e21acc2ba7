"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022, arXiv:2205.05198).

Between layers every rank holds a share of the tokens, `(1, t, D)`. A layer gathers them, computes its share of heads,
hidden channels or vocabulary with the code for one process, and its last product is summed over the ranks and shared
out again by tokens:

| part                      | first product            | last product             |
| ------------------------- | ------------------------ | ------------------------ |
| Mamba-2, attention        | gather; heads, groups    | heads in; reduce-scatter |
| Mamba-1                   | gather; channels         | channels in; reduce-scatter |
| feed-forward              | gather; hidden           | hidden in; reduce-scatter|
| embedding                 | vocabulary rows          | reduce-scatter           |
| head and loss             | gather; vocabulary rows  | reduce-scatter, backward |

Backward mirrors it: one gather and one reduce-scatter for each layer each way. The step sizes, B and C of Mamba-1 are
made of all channels after its convolution: one all-reduce of `R + 2N` numbers a token each way besides.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from ..model.linear import Embedding, Linear, PartialLinear, join, joined_partial
from ..model.lm import HybridLM
from ..model.norms import GatedRMSNorm
from ..model.rules import ShardRule
from ..model.sequence import SequenceContext
from .comm import GatherLinear, GatherTokens, ScatterTokens, SumPartial
from .mesh import Mesh
from .norm import spread_gated_norm
from .vocabulary import vocabulary_loss

Groups = tuple[tuple[nn.Linear, ...], ...]
View = Callable[[Tensor], Tensor]


def shard_tensors(model: HybridLM, mesh: Mesh, done: Collection[str] = ()) -> None:
    """Cut every parameter over `tp` and set the seams, in place; call on the meta device, before FSDP.

    The degree must divide heads, hidden widths and vocabulary (`fit_problems`). Groups of B and C and KV heads that it
    does not divide stay whole in memory, and each rank computes with those that its heads use. Parameters in
    `done` are left as they are.
    """
    if mesh.size("tp") == 1:
        return
    group = mesh.group("tp")
    views = _cut_parameters(model, mesh, done)
    for name, module in model.named_modules():
        if hasattr(module, "project"):
            module.project = partial(project, group=group)
        if hasattr(module, "select"):
            module.select = partial(select, group=group)
        if isinstance(module, Linear) and model.shard_rules()[f"{name}.weight"].dim == 1:
            module.forward = partial(scatter_linear, module, group=group)  # type: ignore[method-assign]
        if isinstance(module, GatedRMSNorm) and (len(module.weight) // mesh.size("tp")) % module.group_size:
            module.forward = partial(spread_gated_norm, module, group=group)  # type: ignore[method-assign]
    if model.embed is not None:
        model.embed.forward = partial(embed, model.embed, group=group)  # type: ignore[method-assign]
    model.loss = partial(spread_loss, group=group)
    model.register_forward_pre_hook(_refuse_logits, with_kwargs=True)
    _run_with_local_parameters(model, views)


def project(x_1tD: Tensor, groups: Groups, seq: SequenceContext, *, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The seam `project`: gather this rank's tokens with all others', then `joined_linear` with this rank's rows."""
    rows, length = seq.shape
    weights, biases = zip(*(join(maps) for maps in groups), strict=True)
    outputs = GatherLinear.apply(x_1tD.flatten(0, 1), rows * length, group, *weights)
    return tuple(
        (out if bias is None else out + bias).view(rows, length, -1) for out, bias in zip(outputs, biases, strict=True)
    )


def select(x_BLi: Tensor, maps: tuple[PartialLinear, ...], *, group: dist.ProcessGroup) -> Tensor:
    """The seam `select` of Mamba-1: `joined_partial` of this rank's channels, summed over ranks, whole on each."""
    return SumPartial.apply(joined_partial(x_BLi, maps), group)


def scatter_linear(linear: nn.Linear, y_BLF: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """A layer's last map: this rank's columns, summed over ranks, of which each keeps its tokens `(1, t, D)`."""
    out_tD = ScatterTokens.apply(F.linear(y_BLF.flatten(0, 1), linear.weight), group)
    return (out_tD if linear.bias is None else out_tD + linear.bias)[None]


def embed(embedding: Embedding, tokens_BL: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens `(1, t, D)`, looked up among all ranks' rows of the vocabulary."""
    rows = embedding.weight.shape[0]
    index_T = tokens_BL.flatten() - dist.get_rank(group) * rows
    mine_T = (index_T >= 0) & (index_T < rows)
    found_TD = F.embedding(index_T.masked_fill(~mine_T, 0), embedding.weight)
    return ScatterTokens.apply(found_TD.masked_fill(~mine_T[:, None], 0.0), group)[None]


def spread_loss(
    x_tD: Tensor, weight_vD: Tensor, target_T: Tensor, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The seam `loss`: the cross-entropy over the whole vocabulary, of which this rank has the rows `weight_vD`."""
    return vocabulary_loss(GatherTokens.apply(x_tD, len(target_T), group), weight_vD, target_T, group)


def replicated_gradients(model: nn.Module) -> list[Tensor]:
    """Local gradients of parameters that every `tp` rank holds whole; each rank's is its own tokens' share."""
    found = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if not isinstance(gradient, DTensor):
            continue
        axes = gradient.device_mesh.mesh_dim_names or ()
        if "tp" in axes and gradient.placements[axes.index("tp")].is_replicate():
            found.append(gradient.to_local())
    return found


def sum_replicated_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Complete the gradients of parameters that are not cut over `tp`: one all-reduce for all. Collective over `tp`.

    To be called once after the last backward pass of a step. Without a `tp` axis nothing is sent.
    """
    if mesh.size("tp") == 1 or not (gradients := replicated_gradients(model)):
        return
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole, group=mesh.group("tp"))
    for gradient, summed in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def units_of_rank(rule: ShardRule, ranks: int, rank: int) -> list[int]:
    """Which groups (or KV heads) a rank's heads use, repeated so that equally many neighbouring heads share each."""
    heads, per_unit = rule.heads // ranks, rule.heads // rule.count
    block = math.gcd(heads, per_unit)
    return [(rank * heads + first) // per_unit for first in range(0, heads, block)]


def _cut_parameters(model: HybridLM, mesh: Mesh, done: Collection[str]) -> dict[str, View]:
    """Make every parameter a DTensor over `tp`; what turns it into the tensor that this rank computes with, by name."""
    ranks, rank = mesh.size("tp"), mesh.rank("tp")
    views: dict[str, View] = {}
    for name, rule in model.shard_rules().items():
        if name in done:
            continue
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        placement = Replicate() if rule.dim is None or rule.count % ranks else Shard(rule.dim)
        parameter = getattr(module, attribute)
        cut = distribute_tensor(parameter.detach(), mesh.tp, [placement], src_data_rank=None)
        module.register_parameter(attribute, nn.Parameter(cut, parameter.requires_grad))
        copied = placement.is_replicate() and rule.dim is not None
        units = units_of_rank(rule, ranks, rank) if copied else None
        views[name] = partial(_local_view, count=rule.count, units=units)
    return views


def _local_view(parameter: Tensor, count: int, units: list[int] | None) -> Tensor:
    """This rank's part of a parameter; of one that is whole here but counted in units, those that `units` lists."""
    assert isinstance(parameter, DTensor)
    local = parameter.to_local()
    if units is None:
        return local
    by_unit = local.unflatten(0, (count, -1))
    return torch.cat([by_unit[unit] for unit in units])


@dataclass
class LocalParameters:
    """A module's forward, run while its parameters are this rank's plain tensors instead of DTensors."""

    forward: Callable[..., Any]
    parameters: list[tuple[nn.Module, str, View]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Swap, run, and put the parameters back, so that FSDP finds what it left."""
        kept = [module._parameters[name] for module, name, _ in self.parameters]
        try:
            for (module, name, view), parameter in zip(self.parameters, kept, strict=True):
                module._parameters[name] = view(parameter)  # type: ignore[arg-type, assignment]
            return self.forward(*args, **kwargs)
        finally:
            for (module, name, _), parameter in zip(self.parameters, kept, strict=True):
                module._parameters[name] = parameter


def _run_with_local_parameters(model: HybridLM, views: dict[str, View]) -> None:
    """Let each module that FSDP gathers as a whole, the inner ones first, run with its own parameters swapped."""
    pending = dict(views)
    inner = [name for name, module in model.named_modules() if getattr(module, "keep_fp32", False)]
    for unit in [*inner, *(f"layers.{number}" for number in model.layers), ""]:
        prefix = f"{unit}." if unit else ""
        own = [name for name in pending if name.startswith(prefix)]
        parameters = []
        for name in own:
            owner, _, attribute = name.rpartition(".")
            parameters.append((model.get_submodule(owner), attribute, pending.pop(name)))
        module = model.get_submodule(unit)
        module.forward = LocalParameters(module.forward, parameters)


def _refuse_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if model.is_last and len(args) < 3 and kwargs.get("targets_BL") is None:
        raise ValueError("a model spread over tp gives losses, not logits; load its checkpoint into one process")
