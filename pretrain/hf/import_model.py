"""Reads a published Hugging Face model into our parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...model.config import ModelConfig
from ..saved_run import parameter_shapes
from .mapping import WeightNames, joins
from .stock import stock_class_of
from .stock_folder import read_json, read_weights


def import_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and float32 parameters of a Mamba, Mamba2, NemotronH, Bamba, GraniteMoeHybrid or Jamba folder.

    The model computes what the stock class does, its quirks included: NemotronH clamps step sizes to `time_step_min`.
    Needs no transformers; reads safetensors only.

    Raises:
        UserError: another class, an option we do not offer, or tensors missing, left over or of another shape.
    """
    folder = Path(folder)
    fields = {key: _plain(value) for key, value in read_json(folder / "config.json").items()}
    stock = stock_class_of(fields, str(folder))
    config = stock.model_config(fields)
    if problems := config.problems():
        raise UserError(f"{folder}/config.json: {'; '.join(problems)}")
    tensors = {published_name(name, stock.names): tensor for name, tensor in read_weights(folder).items()}
    shapes = parameter_shapes(config)
    wanted = joins(stock.names, config, shapes)
    missing = [join.stock for join in wanted if join.stock not in tensors]
    # Some files carry a tied head all the same.
    extra = sorted(set(tensors) - {join.stock for join in wanted} - {"lm_head.weight"})
    if missing or extra:
        raise UserError(f"{folder}: tensors do not fit its config.json; missing {missing[:3]}, left over {extra[:3]}")
    if config.tie_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors["lm_head.weight"], tensors[wanted[0].stock], folder)
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    for join in wanted:
        if not join.copy:
            join.from_stock(tensors[join.stock], weights)
    return config, weights


def _plain(value: Any) -> Any:
    """transformers writes infinities as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def published_name(name: str, names: WeightNames) -> str:
    """NemotronH is published with two names of its backbone, Mamba with two of its embedding; `names` has one."""
    if names.backbone == "backbone":
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        name = name.replace("backbone.embedding.", "backbone.embeddings.", 1)
    return name


def _check_tied(head_VD: Tensor, embedding_VD: Tensor, folder: Path) -> None:
    if not torch.equal(head_VD, embedding_VD):
        raise UserError(
            f"{folder}: config.json ties head and embedding, but the two differ; set tie_word_embeddings to false there"
        )
