"""The parts of a run, built from its configuration and put where its last checkpoint left them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..data import BatchLoader, TokenDataset, Tokenizer, TokenRows, check_tokenizer
from ..errors import UserError
from ..model.lm import HybridLM
from ..parallel.comm import raise_together
from ..parallel.fsdp import materialise, shard_model
from ..parallel.mesh import World, build_mesh
from ..parallel.recompute import recompute_blocks
from .config import Config
from .metrics import Metrics
from .optimizers import Optimizer, build_optimizers
from .resume import Progress, resume_training, save_training, training_tensors
from .run_folder import RunFolder, cut_metrics, open_run_folder, write_record


@dataclass
class Run:
    """The parts of a run on this process; `folder` and `metrics` exist on rank 0 alone."""

    config: Config
    world: World
    model: HybridLM
    optimizers: list[Optimizer]
    tensors: dict[str, torch.Tensor]
    loader: BatchLoader
    heldout: TokenDataset
    data_facts: dict[str, Any]
    progress: Progress
    folder: RunFolder | None
    metrics: Metrics | None

    def save(self) -> None:
        """Write a checkpoint of this step. Collective."""
        save_training(
            checkpoints(self.config), self.tensors, self.progress, self.data_facts, self.config.checkpoint.keep_last
        )

    def close(self) -> None:
        """Stop the loader, finish the metrics and let the next process into the folder."""
        self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.folder is not None:
            self.folder.close()


def checkpoints(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return config.run.folder / "checkpoints"


def build_run(config: Config, world: World) -> Run:
    """Open the run folder and the data, build the model and its optimizers, load the newest checkpoint. Collective.

    Raises:
        UserError: on every process, when any of them cannot go on.
    """
    mesh = build_mesh(config.parallel, world)
    rows, heldout = open_data(config)
    folder = open_together(config, world)
    model = build_model(config, mesh, world.device)
    optimizers = build_optimizers(model, config.optimizer)
    tensors = training_tensors(model, optimizers)
    facts = data_facts(config, rows.dataset)
    resumed = resume_training(checkpoints(config), tensors, facts, world.rank)
    progress = resumed or Progress()
    loader = BatchLoader(
        rows,
        batch_rows=config.train.batch_rows // world.size,
        rank=world.rank,
        world_size=world.size,
        start=progress.next_row,
        prefetch=config.data.prefetch,
    )
    metrics = None
    if folder is not None:
        write_record(folder, config, {"layout": layout(mesh), "data": facts, "resumed_at": progress.step})
        shutil.copyfile(rows.dataset.tokenizer_path, folder.path / "tokenizer.model")
        cut_metrics(folder.metrics, progress.step)
    metrics = start_metrics(config, folder)
    if metrics is not None and progress.step < config.train.steps:
        metrics.start(progress.step, progress.tokens)
    return Run(config, world, model, optimizers, tensors, loader, heldout, facts, progress, folder, metrics)


def open_together(config: Config, world: World) -> RunFolder | None:
    """Rank 0's run folder, None elsewhere; every process learns when it cannot be opened. Collective."""
    folder, error = None, None
    if world.is_first:
        try:
            folder = open_run_folder(config)
        except UserError as met:
            error = met
    raise_together(error)
    return folder


def start_metrics(config: Config, folder: RunFolder | None) -> Metrics | None:
    """Rank 0's metrics, None elsewhere; every process learns when wandb cannot be reached. Collective."""
    metrics, error = None, None
    if folder is not None:
        try:
            metrics = Metrics(config, folder.metrics)
        except UserError as met:
            error = met
    raise_together(error)
    return metrics


def open_data(config: Config) -> tuple[TokenRows, TokenDataset]:
    """The training rows and the held-out split, checked against the tokenizer and the model's vocabulary. Collective.

    Raises:
        UserError: on every process, when the data is damaged or does not fit on any.
    """
    error = None
    try:
        data, heldout = TokenDataset(config.data.folder, "train"), TokenDataset(config.data.folder, "heldout")
        check_tokenizer(data, Tokenizer.load(data.tokenizer_path))
        if data.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size} is below the {data.vocab_size} pieces of the tokenizer in "
                f"{config.data.folder}; set model.vocab_size={data.vocab_size} or more"
            )
        rows = TokenRows(data, config.data.seq_len, config.data.seed)
    except UserError as met:
        error = met
    raise_together(error)
    return rows, heldout


def data_facts(config: Config, data: TokenDataset) -> dict[str, Any]:
    """What fixes the order of the data; a run may only be resumed with the same."""
    return {
        "fingerprint": data.fingerprint,
        "tokenizer_hash": data.tokenizer_hash,
        "seed": config.data.seed,
        "seq_len": config.data.seq_len,
        "batch_rows": config.train.batch_rows,
    }


def layout(mesh: DeviceMesh) -> dict[str, int]:
    """The degree of each mesh axis by name."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype matrices are multiplied in."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.train.precision)


def build_model(config: Config, mesh: DeviceMesh, device: torch.device) -> HybridLM:
    """The sharded model with its initial values."""
    with torch.device("meta"):
        model = HybridLM(config.model)
    recompute_blocks(model, config.train.recompute)
    shard_model(model, mesh, config.parallel, compute_dtype(config, device))
    materialise(model, device, config.run.seed)
    if config.train.compile:
        for block in model.layers:
            block.compile()
    return model
