"""The training loop: the whole run is `train`, on one page."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch

from ..data import TokenDataset
from ..errors import UserError
from ..kernels.dispatch import use_backend
from ..parallel.comm import sum_over_ranks
from ..parallel.mesh import World
from ..parallel.pulse import RECORD, Pulse
from ..parallel.watch import Watch
from .build import choose_kernels
from .config import Config
from .control import Control, Wish
from .evaluate import evaluate
from .resume import Progress
from .rewind import handle_spikes
from .run import Run, build_run


@dataclass
class Pace:
    """Updates, target tokens and seconds since the last record; evaluations and saves do not count."""

    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Skips:
    """Updates skipped since the last record and in a row, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.since_record = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)

    def add(self, skip: torch.Tensor) -> None:
        """Count a step, 1 where it was skipped."""
        self.since_record += skip
        self.in_a_row = (self.in_a_row + skip) * skip

    def take(self) -> int:
        """How many there were since the last time. Waits for the device."""
        found = int(self.since_record)
        self.since_record.zero_()
        return found


def train(config: Config, world: World, until: int | None = None, watch: Watch | None = None) -> Progress:
    """Train until `config.train.steps`, from the newest checkpoint of the run folder if it has one. Collective.

    With `until` it saves and stops after that step already; the next start goes on as if it had not stopped.

    Raises:
        UserError: for anything the user can put right.
    """
    on_torch = choose_kernels(config, world.device) == "torch"
    with use_backend("torch" if on_torch else config.train.kernels):
        return take_steps(build_run(config, world), until, watch)


def take_steps(run: Run, until: int | None, watch: Watch | None) -> Progress:
    """The loop of `train`. Collective."""
    config, progress, steps = run.config, run.progress, run.config.train.steps
    stop = steps if until is None else min(until, steps)
    pulse = watch.pulse if watch else Pulse()
    skips, pace = Skips(run.world.device), Pace()
    if watch:
        watch.last_words = run.tell_stall
    # It listens to the very end: SIGTERM, which a launcher sends after a first failure, cuts no closing short.
    with Control(run.folder.path if run.folder else None) as control, closing(run, pulse):
        run.clock.begin_training(progress.step, progress.tokens, steps)
        while progress.step < stop:
            started = time.perf_counter()
            loss_sum, targets, norm, skip = update(run)
            skips.add(skip)
            pulse.step(progress.step)
            run.clock.step(progress.step, progress.tokens)
            wish = listen(run, control)
            if wish.stops:
                stop = progress.step
            log = due(progress.step, config.log.every_steps, steps)
            save = due(progress.step, config.checkpoint.every_steps, stop) or wish.saves
            must = progress.step == stop or Wish.SAVE in wish
            copy = not must and due(progress.step, config.checkpoint.memory_every_steps, 0)
            if handle_spikes(run, pulse, settle=save or copy):
                skips, pace = Skips(run.world.device), Pace()
                if wish.stops:
                    stop = progress.step
                    run.forget_memory()
                    run.tell_stop(wish.reason)
                else:
                    control.ask(wish)  # after the next step
                continue
            with pulse.phase(RECORD) if log or save or copy else nullcontext():
                if log or save or copy:
                    count_skipped(run, skips.take())  # waits for the device
                pace.updates += 1
                pace.tokens += targets
                pace.seconds += time.perf_counter() - started
                run.trace(Wish.PROFILE in wish, pulse)
                if log:
                    report_step(run, loss_sum, targets, norm, pace)
                    pace = Pace()
                    check_finite(config, progress, int(skips.in_a_row))
                    report_slow_ranks(run, watch)
            if run.copies and (save or copy or due(progress.step, config.train.checksum_every, steps)):
                run.copies.check(progress.step)
            if run.heldout and (due(progress.step, config.eval.every_steps, steps) or Wish.EVALUATE in wish):
                with pulse.phase("evaluation"), run.clock.phase("eval"):
                    report_heldout(run, run.heldout)
            keep(run, pulse, save, must, copy)
            if log or save:
                run.look_around()
            if wish.stops:
                run.tell_stop(wish.reason)
        if progress.step >= steps:
            run.forget_memory()
        run.clock.set_status("finished" if progress.step >= steps else "stopped")
    return progress


@contextmanager
def closing(run: Run, pulse: Pulse) -> Iterator[None]:
    """Close the run at the end, whichever it is."""
    try:
        yield
    finally:
        with pulse.phase("end"):
            run.close(sys.exception())


def listen(run: Run, control: Control) -> Wish:
    """What is asked of the run after this step; the news of saves under way is told too. Collective."""
    if run.saver.is_due():
        control.ask(Wish.PERIODIC_SAVE)
    wish = control.agreed()
    run.poll()
    return wish


def keep(run: Run, pulse: Pulse, save: bool, must: bool, copy: bool) -> None:
    """Keep this step, as a `copy` in memory and by a `save` to the disk, each where it is due. Collective."""
    if copy or save:
        with pulse.phase("save"):
            if copy:
                run.copy_to_memory()
            if save:
                run.save(must)


def update(run: Run) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
    """One update, or none where a gradient is not finite or the loss jumps. Collective.

    Returns:
        this rank's share of the summed loss, the targets of all ranks, the gradients' norm before clipping, and 1 where
        the update was skipped; all but the second on the device.
    """
    config, progress = run.config, run.progress
    loss_sum, targets = run.engine.forward_backward(next(run.loader))
    norm = run.engine.clip_gradients(config.train.clip_norm)
    end_row = run.loader.next_row
    skip = (~norm.isfinite()).float()
    if run.guard is not None:
        skip = run.guard.judge(loss_sum, targets, norm, progress.step + 1, end_row)
    for optimizer in run.optimizers:
        optimizer.step(config.schedule.scale(progress.step + 1, config.train.steps), skip)
    run.engine.routing.finish_step(run.engine.models, skip)
    if run.average is not None:
        run.average.update(skip)
    run.engine.zero_grad()
    progress.step += 1
    progress.next_row = end_row
    progress.tokens += targets
    return loss_sum, targets, norm, skip


def count_skipped(run: Run, updates: int) -> None:
    """Note that of the updates since the last call so many were skipped."""
    progress = run.progress
    progress.skipped += updates
    run.clock.count_skipped(updates)
    if updates and run.guard is None:  # which tells of each by itself
        text = f"{updates} updates had a non-finite gradient and were skipped, {progress.skipped} since the run began"
        run.alerts.send("nan", progress.step, text)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: only at the end) and after the `last` is done after `step`."""
    return step == last or (every > 0 and step % every == 0)


def report_step(run: Run, loss_sum: torch.Tensor, targets: int, norm: torch.Tensor, pace: Pace) -> None:
    """Write this step's record. Collective."""
    total = sum_over_ranks(loss_sum) if run.guard is None else run.guard.loss_sum
    loss = float(total) / max(1, targets)
    routing = run.engine.routing.report(run.engine.models)
    progress, config = run.progress, run.config
    if run.metrics is not None:
        run.metrics.train(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": loss if math.isfinite(loss) else None,
                "lr": config.optimizer.lr * config.schedule.scale(progress.step, config.train.steps),
                "grad_norm": float(norm) if math.isfinite(norm) else None,
                "tokens_per_s": pace.tokens / pace.seconds,
                "seconds": pace.seconds,
                "skipped": progress.skipped,
            },
            seconds_left=(config.train.steps - progress.step) * pace.seconds / pace.updates,
        )
        if routing is not None:
            run.metrics.routing(progress.step, routing.record(), routing.warning())


def report_slow_ranks(run: Run, watch: Watch | None) -> None:
    """Write a record of every process that was found slow since the last time."""
    for slow in watch.slow_ranks() if watch else []:
        if run.metrics is not None:
            run.metrics.slow_rank({"step": run.progress.step, **asdict(slow)})
        text = f"rank {slow.rank} ({slow.host}) works {slow.own_s:.3g} s of a step itself, others {slow.others_s:.3g} s"
        run.alerts.send("slow_rank", run.progress.step, text)


def check_finite(config: Config, progress: Progress, skipped_in_a_row: int) -> None:
    """Stop a run whose gradients stay non-finite.

    Raises:
        UserError: as many updates in a row were skipped as `train.nonfinite_limit` allows.
    """
    if skipped_in_a_row >= config.train.nonfinite_limit:
        raise UserError(
            f"{skipped_in_a_row} updates in a row up to step {progress.step} had a non-finite gradient and were "
            f"skipped; lower optimizer.lr or train.clip_norm under another run.name (this run: {config.run.folder})",
            everywhere=True,
        )


def report_heldout(run: Run, heldout: TokenDataset) -> None:
    """Evaluate and write the record. Collective."""
    # Documents differ in length: a compiled block would be compiled again for each.
    with torch.compiler.set_stance("force_eager"):
        found = evaluate(run.engine, heldout, run.config.eval)
    if run.metrics is not None:
        run.metrics.evaluation(
            {
                "step": run.progress.step,
                "tokens": run.progress.tokens,
                "loss": found.loss,
                "bits_per_byte": found.bits_per_byte,
            }
        )
