"""What a checkpoint holds beside tensors, and how a run goes on from one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError
from ..parallel.comm import do_together
from .average import WeightAverage
from .checkpoint import (
    CheckpointDamagedError,
    CheckpointUnreadableError,
    check_whole,
    checkpoint_step,
    is_whole,
    list_checkpoints,
    load_checkpoint,
    previous_whole,
    read_extra,
    read_rank_tensors,
    set_aside,
)
from .memory import Kept
from .optimizers.sharded import Optimizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds beside tensors of all ranks, as it is when this is made.

    Attributes:
        step: updates done.
        extra: counters, and what the run must still be to go on.
        random_states: of this process.
    """

    step: int
    extra: dict[str, Any]
    random_states: dict[str, torch.Tensor]


def take_snapshot(progress: Progress, facts: Facts) -> Snapshot:
    """The snapshot of this moment."""
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(progress.step, {"progress": asdict(progress), **asdict(facts)}, random_states)


def resume_training(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    facts: Facts,
    rank: int,
    fresh_optimizer: bool = False,
    before: int | None = None,
    in_memory: Callable[[int], Kept | None] | None = None,
) -> Progress | None:
    """Load the newest whole checkpoint in `folder` into `tensors`; None when there is none. Collective.

    Copies in memory that are newer go first: `in_memory(step)` loads the newest of those made after `step`.

    A damaged one is set aside under another name, with a warning, and the one before it is taken; rank 0 looks and
    renames. With `fresh_optimizer`, state that another optimizer saved is left where it is; with `before`, only
    checkpoints of earlier steps than that are looked at. On as many ranks as saved it, random states are restored too
    and training continues bit for bit.

    Raises:
        UserError: as `read_matching`, or no whole checkpoint is left; the same on every process.
    """
    filled: set[str] = set()
    while True:
        checkpoint = first_says(lambda: _newest(folder, before), rank)
        if in_memory is not None and (kept := in_memory(_step_of(checkpoint))) is not None:
            return _go_on_from_memory(kept)
        if checkpoint is None:
            return None
        try:
            return _go_on_from(checkpoint, tensors, facts, rank, fresh_optimizer, filled)
        except CheckpointDamagedError as damaged:
            good = first_says(partial(previous_whole, checkpoint), rank)
            kept = in_memory(_step_of(good)) if in_memory is not None else None
            instead = f"the copies in memory of step {kept.step}" if kept else good
            _fall_back(checkpoint, damaged, instead, rank)
            if kept is not None:
                return _go_on_from_memory(kept)


def _step_of(checkpoint: Path | None) -> int:
    return checkpoint_step(checkpoint) if checkpoint else -1


def _go_on_from_memory(kept: Kept) -> Progress:
    _set_random_states(kept.random_states)
    return Progress(**kept.extra["progress"])


def _set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _newest(folder: Path, before: int | None) -> Path | None:
    found = [path for path in list_checkpoints(folder) if before is None or checkpoint_step(path) < before]
    return found[-1] if found else None


def _go_on_from(
    checkpoint: Path,
    tensors: Mapping[str, torch.Tensor],
    facts: Facts,
    rank: int,
    fresh_optimizer: bool,
    filled: set[str],
) -> Progress:
    """Load `checkpoint`. Collective. `filled`, which grows, are tensors in which a damaged one may have left values.

    Raises:
        CheckpointDamagedError: on every process.
        UserError: as `resume_training`.
    """
    _agree_on_damage(lambda: check_whole(checkpoint) if rank == 0 else None)
    progress, same_optimizer = _agree_on_damage(lambda: read_matching(checkpoint, facts, fresh_optimizer))
    wanted = {name: x for name, x in tensors.items() if same_optimizer or not name.startswith(OPTIMIZER)}
    if filled - wanted.keys():
        raise UserError(
            f"{checkpoint} was saved by another optimizer than the damaged checkpoint after it, which is set aside by "
            "now; start the run again to go on from it",
            everywhere=True,
        )
    filled.update(wanted)
    _agree_on_damage(lambda: load_checkpoint(checkpoint, wanted, offer=False))
    random_states = _agree_on_damage(lambda: read_rank_tensors(checkpoint, rank, offer=False))
    if random_states:
        _set_random_states(random_states)
    return progress


def read_matching(checkpoint: Path, facts: Facts, fresh_optimizer: bool) -> tuple[Progress, bool]:
    """How far `checkpoint` had come, and whether the optimizer's state in it fits.

    Raises:
        UserError: it was trained on other data, another tokenizer, seed or batch, its manifest is damaged, or another
            optimizer saved it and `fresh_optimizer` is not set.
    """
    extra = read_extra(checkpoint, offer=False)
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
    return Progress(**extra["progress"]), not changed


def _fall_back(checkpoint: Path, damaged: CheckpointDamagedError, instead: Path | str | None, rank: int) -> None:
    """Set `checkpoint` aside, where there is something to go on from instead. Collective."""

    def act() -> None:
        if isinstance(damaged, CheckpointUnreadableError) and is_whole(checkpoint):
            raise UserError(
                f"{damaged.damage} on another rank, but is there on rank 0; let all machines read the folder"
            )
        if instead is None:
            raise UserError(
                f"{damaged.damage}; there is no older good checkpoint beside it: restore one, "
                "or choose another run.name to start over"
            )
        aside = set_aside(checkpoint)
        logger.warning("%s; it is kept as %s, and the run goes on from %s", damaged.damage, aside.name, instead)

    first_says(act, rank)


def first_says(action: Callable[[], T], rank: int) -> T:
    """What `action` returns on rank 0, or the error it met, on every process. Collective."""
    said = [do_together(lambda: action() if rank == 0 else None)]
    dist.broadcast_object_list(said, src=0)
    return said[0]  # type: ignore[return-value]


def _agree_on_damage(action: Callable[[], T]) -> T:
    """`action()` on every process; damage that any of them found is raised on all. Collective, as `do_together`.

    Raises:
        CheckpointDamagedError: some found damage, and none anything else; the lowest rank's words, with those that
            another machine may contradict last.
        UserError: any met something else.
    """
    damaged: CheckpointDamagedError | None = None

    def attempt() -> T | None:
        nonlocal damaged
        try:
            return action()
        except CheckpointDamagedError as error:
            damaged = error
        return None

    result = do_together(attempt)
    everyone: list[CheckpointDamagedError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, damaged)
    found = sorted((e for e in everyone if e is not None), key=lambda e: isinstance(e, CheckpointUnreadableError))
    if found:
        raise found[0]
    return result  # type: ignore[return-value]


def _changed(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    return "; ".join(f"{key}: {saved.get(key)} -> {wanted.get(key)}" for key in keys)
