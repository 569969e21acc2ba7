"""What a checkpoint holds beside tensors, and how a run goes on from one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..parallel.comm import do_together
from .average import WeightAverage
from .checkpoint import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    read_extra,
    read_rank_tensors,
    save_checkpoint,
)
from .optimizers import Optimizer

MODEL, AVERAGE, OPTIMIZER = "model.", "average.", "optim."


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        tokens: tokens trained on (targets, over all processes).
        next_row: the data order's next row; with the seed this is the loader's whole state.
        skipped: updates skipped for a non-finite gradient or a spike of the loss.
        skipped_rows: stretches `[first, end)` of rows left out after spikes, in the order of the rewinds.
        spikes: what is known of recent losses, in a checkpoint; see `SpikeGuard.state`.
    """

    step: int = 0
    tokens: int = 0
    next_row: int = 0
    skipped: int = 0
    skipped_rows: list[list[int]] = field(default_factory=list)
    spikes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """What a run must still be to go on from its checkpoint.

    Attributes:
        data: what fixes the data order: fingerprint, tokenizer hash, seed, rows per update.
        optimizer: what its state is made of.
    """

    data: dict[str, Any]
    optimizer: dict[str, Any]


def training_tensors(
    parameters: Mapping[str, torch.Tensor], optimizers: Sequence[Optimizer], average: WeightAverage | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor that training changes on this process, by its checkpoint key; loading writes into them."""
    tensors = {f"{MODEL}{name}": parameter.detach() for name, parameter in parameters.items()}
    if average is not None:
        tensors |= {f"{AVERAGE}{name}": tensor for name, tensor in average.state().items()}
    for optimizer in optimizers:
        tensors |= {f"{OPTIMIZER}{name}": tensor for name, tensor in optimizer.state().items()}
    return tensors


def save_training(
    folder: Path, tensors: Mapping[str, torch.Tensor], progress: Progress, facts: Facts, keep_last: int
) -> Path:
    """Write the checkpoint of this step. Collective.

    Args:
        folder: the run's `checkpoints/`.
        tensors: from `training_tensors`.
        progress: counters.
        facts: what the run must still be to go on.
        keep_last: older checkpoints beyond this number are removed.
    """
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    return save_checkpoint(
        folder,
        progress.step,
        dict(tensors),
        extra={"progress": asdict(progress), **asdict(facts)},
        rank_tensors=random_states,
        keep_last=keep_last,
    )


def resume_training(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    facts: Facts,
    rank: int,
    fresh_optimizer: bool = False,
    before: int | None = None,
) -> Progress | None:
    """Load the newest checkpoint in `folder` into `tensors`; None when there is none. Collective.

    With `fresh_optimizer`, state that another optimizer saved is left where it is. With `before`, the newest of an
    earlier step than that.

    On as many ranks as saved it, random states are restored too and training continues bit for bit.

    Raises:
        UserError: as `find_matching`, or a piece of the checkpoint is damaged; the same on every process.
    """
    found = do_together(lambda: find_matching(folder, facts, fresh_optimizer, before))
    if found is None:
        return None
    checkpoint, progress, same_optimizer = found
    wanted = {name: tensor for name, tensor in tensors.items() if same_optimizer or not name.startswith(OPTIMIZER)}
    do_together(lambda: load_checkpoint(checkpoint, wanted))
    random_states = do_together(lambda: read_rank_tensors(checkpoint, rank))
    if random_states:
        torch.set_rng_state(random_states["cpu"])
        if torch.cuda.is_available() and "cuda" in random_states:
            torch.cuda.set_rng_state(random_states["cuda"])
    return progress


def find_matching(
    folder: Path, facts: Facts, fresh_optimizer: bool, before: int | None = None
) -> tuple[Path, Progress, bool] | None:
    """The newest checkpoint in `folder`, how far it had come, and whether the optimizer's state fits; None without any.

    With `before`, the newest of an earlier step than that.

    Raises:
        UserError: it was trained on other data, another tokenizer, seed or batch, its manifest is damaged, or another
            optimizer saved it and `fresh_optimizer` is not set.
    """
    found = [path for path in list_checkpoints(folder) if before is None or checkpoint_step(path) < before]
    if not found:
        return None
    checkpoint = found[-1]
    extra = read_extra(checkpoint)
    if changed := _changed(extra["data"], facts.data):
        raise UserError(
            f"checkpoint {checkpoint} was trained on another data order ({changed}); "
            f"restore what changed, or choose another run.name"
        )
    # Checkpoints from before optimizers were named are compared tensor by tensor.
    changed = _changed(extra.get("optimizer", facts.optimizer), facts.optimizer)
    if changed and not fresh_optimizer:
        raise UserError(
            f"checkpoint {checkpoint} holds the state of another optimizer ({changed}); restore what changed, or go on "
            "with its weights and a new state: checkpoint.fresh_optimizer=true"
        )
    return checkpoint, Progress(**extra["progress"]), not changed


def _changed(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    return "; ".join(f"{key}: {saved.get(key)} -> {wanted.get(key)}" for key in keys)
