"""Optimizers over sharded parameters, all behind one small interface."""

import torch

from ...model.lm import HybridLM
from .adamw import AdamW
from .config import MuonConfig, OptimizerConfig
from .muon import Muon
from .sharded import Optimizer

__all__ = ["AdamW", "Muon", "MuonConfig", "Optimizer", "OptimizerConfig", "build_optimizers"]


def build_optimizers(model: HybridLM, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that together update every parameter of `model` once; call after sharding.

    With `kind="muon"` the matrices inside the layers go to Muon; all else, the embedding and head among it, to AdamW.
    """
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    kinds = model.parameter_kinds()
    matrices = {name: p for name, p in parameters.items() if config.kind == "muon" and kinds[name] == "matrix"}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    built: list[Optimizer] = [
        AdamW(
            rest,
            frozenset(rest) - model.no_decay_names(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    ]
    if matrices:
        built.append(Muon(matrices, config.muon, weight_decay=config.weight_decay))
    return built
