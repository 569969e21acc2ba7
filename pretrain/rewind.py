"""What a run does about spikes of the loss: it tells of each, and goes back to a checkpoint when one lasts."""

import json
import math
import os
from contextlib import nullcontext

from ..data import SkippedRows
from ..errors import UserError
from ..parallel.comm import do_together
from ..parallel.pulse import Pulse
from .checkpoint import checkpoint_step, list_checkpoints, remove_checkpoint
from .config import Config
from .optimizers.low_rank.optimizer import LowRank
from .resume import Progress, resume_training
from .run import Run, checkpoints, open_loader, skipped_rows_file
from .run_folder import replace_file
from .spikes import Judged


def handle_spikes(run: Run, pulse: Pulse, settle: bool) -> bool:
    """Tell of the spikes that the host now learns of, and rewind the run where one lasts. Collective.

    Args:
        run: the run, whose `progress` is put back by a rewind.
        pulse: is told that a rewind is no step.
        settle: wait for the device to have finished the last step too, as before a save.

    Returns:
        Whether the run was rewound.

    Raises:
        UserError: as `rewind`.
    """
    if run.guard is None:
        return False
    with pulse.phase("save") if settle else nullcontext():
        spikes = run.guard.take(settle)
    for judged in spikes:
        if run.metrics is not None:
            run.metrics.spike(judged.record())
        is_finite = math.isfinite(judged.loss) and math.isfinite(judged.grad_norm)
        text = f"loss {judged.loss:.4f}, limit {judged.limit:.4f}, gradient norm {judged.grad_norm:.4g}: skipped"
        run.alerts.send("spike" if is_finite else "nan", judged.step, text)
    if not (spike := run.guard.lasting):
        return False
    with pulse.phase("rewind"):
        rewind(run, spike)
    return True


def rewind(run: Run, spike: list[Judged]) -> None:
    """Put the run back to the newest checkpoint from before a spike and leave out the rows up to its end. Collective.

    Checkpoints from within the spike are removed, and the rows noted beside the others: a run that is killed comes to
    the same, whenever that is.

    Raises:
        UserError: on every process: the run has gone back as often as it may, there is no checkpoint from before the
            spike, or that is damaged.
    """
    first, last, config, guard = spike[0], spike[-1], run.config, run.guard
    assert guard is not None
    where = f"the loss of steps {first.step} to {last.step} was a spike ({_losses(spike)}; limit {first.limit:.4f})"
    earlier = SkippedRows.read(run.progress.skipped_rows)
    if len(earlier.stretches) >= (limit := config.spikes.rewinds_limit):
        raise UserError(
            f"{where}, and the run has gone back {len(earlier.stretches)} times already "
            f"(spikes.rewinds_limit={limit}); look at these rows, lower optimizer.lr under another "
            "run.name, or raise the limit",
            everywhere=True,
        )
    folder = checkpoints(config)
    run.saver.finish()
    found = resume_training(folder, run.tensors, run.facts, run.world.rank, before=first.step)
    if found is None:
        raise UserError(
            f"{where}, and there is no checkpoint from before it to go back to; set checkpoint.every_steps lower or "
            f"checkpoint.keep_last higher, or lower optimizer.lr (this run: {config.run.folder})",
            everywhere=True,
        )
    skipped = earlier.and_also(earlier.following(found.next_row), last.end_row)
    if run.memory is not None:
        run.memory.remove_after(found.step)
    do_together(lambda: abandon(config, found.step, skipped) if run.world.is_first else None)
    put_back(run, found, skipped)
    if run.metrics is not None and run.folder is not None:
        record = {
            "step": found.step,
            "spike": [first.step, last.step],
            "losses": [judged.record()["loss"] for judged in spike],
            "limit": first.record()["limit"],
            "rows": list(skipped.stretches[-1]),
            "rewinds": len(skipped.stretches),
        }
        run.metrics.rewind(run.folder.metrics, record)
    run.alerts.send("rewind", found.step, f"{where}; the run goes on from step {found.step} without its rows")


def put_back(run: Run, found: Progress, skipped: SkippedRows) -> None:
    """Everything of a run that is not in the tensors of its checkpoint."""
    assert run.guard is not None
    vars(run.progress).update(vars(found))
    run.progress.skipped_rows = [list(stretch) for stretch in skipped.stretches]
    run.progress.next_row = skipped.following(found.next_row)
    run.guard.load(found.spikes)
    run.engine.zero_grad()
    run.engine.routing.forget()
    for optimizer in run.optimizers:
        if isinstance(optimizer, LowRank):
            optimizer.clock.forget()
    rows = run.loader.rows
    run.loader.close()
    run.loader = open_loader(run.config, run.engine.mesh, rows, run.progress)


def abandon(config: Config, step: int, skipped: SkippedRows) -> None:
    """Remove the checkpoints after `step`, the newest first, then note the rows that are left out.

    In this order: killed in between, the run meets the same spike again.
    """
    for path in reversed(list_checkpoints(checkpoints(config))):
        if checkpoint_step(path) > step:
            remove_checkpoint(path)
    path = skipped_rows_file(config)
    replace_file(path, json.dumps(skipped.stretches) + "\n")
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _losses(spike: list[Judged]) -> str:
    losses = [f"{judged.loss:.4f}" for judged in spike]
    return ", ".join(losses if len(losses) <= 5 else [*losses[:4], f"... {losses[-1]}"])
