"""What a checkpoint holds beside tensors, and how a run goes on from one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..parallel.comm import do_together
from .checkpoint import latest_checkpoint, load_checkpoint, read_extra, read_rank_tensors, save_checkpoint
from .optimizers import Optimizer


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        tokens: tokens trained on (targets, over all processes).
        next_row: the data order's next row; with the seed this is the loader's whole state.
        skipped: updates skipped for a non-finite gradient.
    """

    step: int = 0
    tokens: int = 0
    next_row: int = 0
    skipped: int = 0


def training_tensors(
    parameters: Mapping[str, torch.Tensor], optimizers: Sequence[Optimizer]
) -> dict[str, torch.Tensor]:
    """Every tensor that training changes on this process, by its checkpoint key; loading writes into them."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for optimizer in optimizers:
        tensors |= {f"optim.{name}": tensor for name, tensor in optimizer.state().items()}
    return tensors


def save_training(
    folder: Path, tensors: Mapping[str, torch.Tensor], progress: Progress, data: Mapping[str, Any], keep_last: int
) -> Path:
    """Write the checkpoint of this step. Collective.

    Args:
        folder: the run's `checkpoints/`.
        tensors: from `training_tensors`.
        progress: counters.
        data: what fixes the data order: fingerprint, tokenizer hash, seed, rows per update.
        keep_last: older checkpoints beyond this number are removed.
    """
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    return save_checkpoint(
        folder,
        progress.step,
        dict(tensors),
        extra={"progress": asdict(progress), "data": dict(data)},
        rank_tensors=random_states,
        keep_last=keep_last,
    )


def resume_training(
    folder: Path, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any], rank: int
) -> Progress | None:
    """Load the newest checkpoint in `folder` into `tensors`; None when there is none. Collective.

    On as many ranks as saved it, random states are restored too and training continues bit for bit.

    Raises:
        UserError: as `find_matching`, or a piece of the checkpoint is damaged; the same on every process.
    """
    found = do_together(lambda: find_matching(folder, data))
    if found is None:
        return None
    checkpoint, progress = found
    do_together(lambda: load_checkpoint(checkpoint, dict(tensors)))
    random_states = do_together(lambda: read_rank_tensors(checkpoint, rank))
    if random_states:
        torch.set_rng_state(random_states["cpu"])
        if torch.cuda.is_available() and "cuda" in random_states:
            torch.cuda.set_rng_state(random_states["cuda"])
    return progress


def find_matching(folder: Path, data: Mapping[str, Any]) -> tuple[Path, Progress] | None:
    """The newest checkpoint in `folder` and how far it had come, None without any.

    Raises:
        UserError: it was trained on other data, another tokenizer, seed or batch, or its manifest is damaged.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return None
    extra = read_extra(checkpoint)
    saved = extra["data"]
    changed = [f"{key}: {saved.get(key)} -> {value}" for key, value in data.items() if saved.get(key) != value]
    if changed:
        raise UserError(
            f"checkpoint {checkpoint} was trained on another data order ({'; '.join(changed)}); "
            f"restore what changed, or choose another run.name"
        )
    return checkpoint, Progress(**extra["progress"])
