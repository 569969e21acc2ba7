"""Optimizers over sharded parameters, all behind one small interface."""

from collections.abc import Iterable

import torch

from ...model.lm import HybridLM
from ...model.rules import ParameterKind
from .adamw import AdamW
from .config import MuonConfig, OptimizerConfig
from .muon import Muon
from .sharded import Optimizer

__all__ = ["AdamW", "Muon", "MuonConfig", "Optimizer", "OptimizerConfig", "build_optimizers"]


def build_optimizers(models: Iterable[HybridLM], config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that together update every parameter of `models`, pipeline stages of one, once; after sharding.

    With `kind="muon"` the matrices inside the layers, those of experts too, go to Muon; all else, the embedding and
    head among it, to AdamW. Balance biases are moved by their routers' load and belong to none.
    """
    parameters: dict[str, torch.Tensor] = {}
    kinds: dict[str, ParameterKind] = {}
    spared: set[str] = set()
    for model in models:
        parameters |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds |= model.parameter_kinds()
        spared |= model.no_decay_names()
    to_muon = ("matrix", "experts") if config.kind == "muon" else ()
    matrices = {name: p for name, p in parameters.items() if kinds[name] in to_muon}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    built: list[Optimizer] = [
        AdamW(
            rest,
            frozenset(rest) - spared,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    ]
    if matrices:
        built.append(Muon(matrices, config.muon, weight_decay=config.weight_decay))
    return built
