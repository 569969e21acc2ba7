"""Finds what a run left behind, and loads its model and tokenizer into one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data import Tokenizer
from ..errors import UserError
from ..model.config import ModelConfig
from ..model.lm import HybridLM
from .checkpoint import latest_checkpoint, load_full, read_extra
from .config import Config, load_config
from .resume import AVERAGE, MODEL


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """One checkpoint of a run with its configuration and tokenizer; `average`: the averaged weights are wanted."""

    folder: Path
    checkpoint: Path
    config: Config
    average: bool = False

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer the run's data was made with."""
        return self.folder / "tokenizer.model"


def find_run(source: str | Path, average: bool = False) -> SavedRun:
    """The latest checkpoint of a run folder, or the one whose folder is given (`runs/NAME/checkpoints/step-N`).

    Raises:
        UserError: no such folder, no configuration in it, no checkpoint yet, or no averaged weights.
    """
    run = _find(Path(source))
    if average and not run.config.train.average_decay:
        raise UserError(f"{run.folder} keeps no averaged weights: they come with train.average_decay, as 0.999")
    return replace(run, average=average)


def _find(source: Path) -> SavedRun:
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give a run folder (runs/NAME) or one of its checkpoints")
    if (source / "config.toml").exists():
        checkpoint = latest_checkpoint(source / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{source} holds no checkpoint; let the run reach its first save")
        return SavedRun(folder=source, checkpoint=checkpoint, config=load_config(source / "config.toml"))
    folder = source.resolve().parent.parent
    if not (source / "manifest.json").exists() or not (folder / "config.toml").exists():
        raise UserError(f"{source} is no run folder and no checkpoint in one; give runs/NAME or a step folder in it")
    return SavedRun(folder=folder, checkpoint=source, config=load_config(folder / "config.toml"))


def load_tokenizer(run: SavedRun) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        UserError: it is missing or unreadable, is not the one that the checkpoint's data was made with, or has more
            pieces than the model knows.
    """
    tokenizer = Tokenizer.load(run.tokenizer_path)
    trained_with = read_extra(run.checkpoint).get("data", {}).get("tokenizer_hash", tokenizer.hash)
    if tokenizer.hash != trained_with or tokenizer.vocab_size > run.config.model.vocab_size:
        raise UserError(
            f"{run.tokenizer_path} is not the tokenizer this model was trained with "
            f"(hash {tokenizer.hash}, trained with {trained_with}); "
            f"copy tokenizer.model from the folder of its data, {run.config.data.folder}"
        )
    return tokenizer


def load_weights(run: SavedRun, shapes: dict[str, torch.Size], names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of the model from the checkpoint, float32, by parameter name; those in `names`, or all in `shapes`.

    Raises:
        UserError: the checkpoint lacks a parameter or holds another shape than the configuration asks for.
    """
    names = list(shapes) if names is None else names
    prefix = AVERAGE if run.average else MODEL
    loaded = load_full(run.checkpoint, [prefix + name for name in names])
    weights = {name: loaded[prefix + name].float() for name in names}
    if wrong := [name for name, tensor in weights.items() if tensor.shape != shapes[name]]:
        raise UserError(
            f"{run.checkpoint}: {wrong[0]} has another shape than {run.folder}/config.toml asks for; "
            "the checkpoint belongs to another run"
        )
    return weights


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and global shape of every parameter of a model, without building it."""
    with torch.device("meta"):
        model = HybridLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def model_from_weights(config: ModelConfig, weights: dict[str, Tensor]) -> HybridLM:
    """A model that holds `weights` (not copied), in evaluation mode."""
    with torch.device("meta"):
        model = HybridLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_run(
    source: str | Path, *, device: str | torch.device = "cpu", average: bool = False
) -> tuple[HybridLM, Tokenizer, Config]:
    """Model (float32, evaluation mode), tokenizer and configuration of a run folder or of one of its checkpoints.

    With `average`, the weights are the averaged ones.

    Raises:
        UserError: as `find_run`, `load_tokenizer` and `load_weights`.
    """
    run = find_run(source, average)
    tokenizer = load_tokenizer(run)
    weights = load_weights(run, parameter_shapes(run.config.model))
    return model_from_weights(run.config.model, weights).to(device), tokenizer, run.config
