"""Which optimizer updates which parameter."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from ...errors import UserError
from ...model.lm import HybridLM
from ...model.rules import ParameterKind
from .adamw import AdamW
from .adamw_8bit import AdamW8bit
from .apex import ApexAdamW
from .config import GroupConfig, OptimizerConfig
from .low_rank.optimizer import METHODS, LowRank, check_rank
from .muon import Muon
from .sharded import Optimizer

# Kinds of parameters whose moments may be 8 bits; the embedding's only where asked for. All else is small or sensitive.
QUANTISED: frozenset[ParameterKind] = frozenset({"matrix", "experts", "head"})


def build_optimizers(models: Iterable[HybridLM], config: OptimizerConfig, seed: int = 0) -> list[Optimizer]:
    """The optimizers that together update every parameter of `models`, pipeline stages of one, once; after sharding.

    With `kind="muon"` or `"low_rank"` the matrices inside the layers, those of experts too, go to that; all else, the
    embedding and head among it, and matrices narrower than `low_rank.min_side`, to AdamW. Balance biases are moved by
    their routers' load and belong to none. `seed` is what stochastic rounding is drawn by.
    """
    parameters: dict[str, torch.Tensor] = {}
    kinds: dict[str, ParameterKind] = {}
    spared: set[str] = set()
    for model in models:
        parameters |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds |= model.parameter_kinds()
        spared |= model.no_decay_names()
    decays: dict[str, float] = {}
    chosen: dict[tuple[str, float], dict[str, torch.Tensor]] = defaultdict(dict)
    for name, parameter in parameters.items():
        group = group_of(name, config.groups)
        decays[name] = 0.0 if name in spared else config.weight_decay
        if group.weight_decay is not None:
            decays[name] = group.weight_decay
        chosen[choose(parameter, kinds[name], config), group.lr_scale][name] = parameter
    order = ("adamw", "adamw_8bit", "muon", "low_rank")
    return [
        _build(kind, members, replace(config, lr=config.lr * lr_scale), decays, lr_scale, seed)
        for (kind, lr_scale), members in sorted(chosen.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def choose(parameter: torch.Tensor, kind: ParameterKind, config: OptimizerConfig) -> str:
    """`adamw`, `adamw_8bit`, `muon` or `low_rank`."""
    if kind in ("matrix", "experts"):
        if config.kind == "muon":
            return "muon"
        if config.kind == "low_rank" and min(parameter.shape[-2:]) >= config.low_rank.min_side:
            return "low_rank"
    may_be = kind in QUANTISED or (kind == "embedding" and config.embedding_bits == 8)
    is_8bit = config.state_bits == 8 and may_be and parameter.numel() >= config.min_8bit_size
    return "adamw_8bit" if is_8bit else "adamw"


def group_of(name: str, groups: Iterable[GroupConfig]) -> GroupConfig:
    """The first group that a parameter's name matches; one that changes nothing without any."""
    return next((group for group in groups if fnmatchcase(name, group.names)), GroupConfig(names="*"))


def check_parameters(config: OptimizerConfig, model: HybridLM) -> None:
    """What can be known of a whole model, on any device, before it is spread.

    Raises:
        UserError: a group that no parameter belongs to, or a rank that some matrix has no room for.
    """
    parameters, kinds = dict(model.named_parameters()), model.parameter_kinds()
    names = list(parameters)
    low_rank = {name: p for name, p in parameters.items() if choose(p, kinds[name], config) == "low_rank"}
    if low_rank and METHODS[config.low_rank.method].needs_rank:
        check_rank(low_rank, config.low_rank)
    for group in config.groups:
        if not any(fnmatchcase(name, group.names) for name in names):
            raise UserError(
                f"optimizer.groups: names={group.names!r} matches no parameter; they are named like {names[1]!r}",
                everywhere=True,
            )


def _build(
    kind: str,
    members: Mapping[str, torch.Tensor],
    config: OptimizerConfig,
    decays: Mapping[str, float],
    lr_scale: float,
    seed: int,
) -> Optimizer:
    decay = {name: decays[name] for name in members}
    if kind == "muon":
        return Muon(members, replace(config.muon, lr=config.muon.lr * lr_scale), weight_decay=decay)
    if kind == "low_rank":
        low_rank = replace(config.low_rank, lr=config.low_rank.lr * lr_scale)
        return LowRank(members, low_rank, betas=config.betas, eps=config.eps, weight_decay=decay)
    if kind == "adamw_8bit":
        return AdamW8bit(
            members,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=decay,
            block_size=config.block_size,
            rounding_seed=seed if config.stochastic_rounding else None,
        )
    adamw = ApexAdamW if config.implementation == "apex" else AdamW
    return adamw(members, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=decay)
