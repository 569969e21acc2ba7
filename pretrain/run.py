"""The parts of a run, built from its configuration and put where its last checkpoint left them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data import BatchLoader, SkippedRows, TokenDataset, Tokenizer, TokenRows, check_tokenizer
from ..errors import UserError
from ..parallel.comm import do_together
from ..parallel.copies import CopyCheck
from ..parallel.mesh import Mesh, World, build_mesh
from ..parallel.pulse import Pulse
from .agreement import check_agreement, check_same_data
from .alerts import Alerts
from .average import WeightAverage
from .build import build_engine, build_stage, choose_kernels, parameter_bytes
from .config import Config
from .control import STOP
from .engine import Engine
from .memory import MemoryCopies
from .memory_run import open_memory, report_copies, search_memory, tell_resumed
from .metrics import Metrics
from .optimizers.build import build_optimizers, check_parameters
from .optimizers.sharded import Optimizer
from .optimizers.size import state_size
from .profile import StepProfiler
from .resume import Facts, Progress, first_says, resume_training, take_snapshot, training_tensors
from .run_clock import RunClock
from .run_folder import RunFolder, cut_metrics, open_run_folder, replace_file, write_record
from .saver import Saver
from .sight import Lookout, open_sight
from .spikes import SpikeGuard

# Other processes end meanwhile, and a launcher may not wait for long.
STALL_ALERT_S = 5.0


@dataclass
class Run:
    """The parts of a run on this process; rank 0 alone has `folder`, `metrics` and `lookout`.

    `heldout` is there where the run evaluates.
    """

    config: Config
    world: World
    engine: Engine
    optimizers: list[Optimizer]
    average: WeightAverage | None
    tensors: dict[str, torch.Tensor]
    loader: BatchLoader
    heldout: TokenDataset | None
    facts: Facts
    progress: Progress
    folder: RunFolder | None
    metrics: Metrics | None
    clock: RunClock
    alerts: Alerts
    lookout: Lookout | None
    profiler: StepProfiler
    saver: Saver
    memory: MemoryCopies | None
    guard: SpikeGuard | None
    copies: CopyCheck | None

    def save(self, must: bool) -> None:
        """Save a checkpoint of this step; `must`: it is to be there afterwards (see `Saver.save`). Collective."""
        self.progress.spikes = self.guard.state() if self.guard else None
        with self.clock.phase("save"):
            self.saver.save(self.progress, must)
        if must:
            self.forget_memory()  # the disk has all that is there
        self.clock.saved()

    def forget_memory(self) -> None:
        """Remove the copies in memory. Collective."""
        if self.memory is not None:
            self.memory.clear()
            report_copies(self.memory, self.metrics)

    def copy_to_memory(self) -> None:
        """Copy the state of this step into memory, where that is on. Collective."""
        if self.memory is None:
            return
        self.progress.spikes = self.guard.state() if self.guard else None
        with self.clock.phase("save"):
            snapshot = take_snapshot(self.progress, self.facts)
            self.memory.take(snapshot.step, snapshot.extra, snapshot.random_states)
        report_copies(self.memory, self.metrics)

    def poll(self) -> None:
        """Learn what became of saves and copies that go on beside training, once a step. Collective."""
        self.saver.poll()
        if self.memory is not None:
            report_copies(self.memory, self.metrics)

    def look_around(self) -> None:
        """Tell of a disk that fills and of a checkpoint that is old."""
        if self.lookout is not None:
            self.lookout.look(self.alerts, self.progress.step)

    def tell_stop(self, reason: str) -> None:
        """Note that the run stops after this step because it was asked to: a line, a record, and the file STOPPED."""
        if self.metrics is not None and self.folder is not None:
            self.metrics.stop(self.progress.step, reason)
            replace_file(self.folder.stopped, json.dumps({"step": self.progress.step, "reason": reason}) + "\n")
            (self.folder.path / STOP).unlink(missing_ok=True)

    def tell_stall(self, line: str) -> None:
        """Tell that this process is about to end because another is missing."""
        self.alerts.send("stall", self.progress.step, line)
        self.alerts.flush(STALL_ALERT_S)

    def trace(self, is_wanted: bool, pulse: Pulse) -> None:
        """Count a step of a trace, say where it is when it is done, and begin one that `is_wanted`. Collective."""
        if self.profiler.step():
            with pulse.phase("profile"):  # all wait for the process that writes, which may take longer than steps do
                path = self.profiler.close()
                dist.barrier()
            if path is not None and self.metrics is not None:
                self.metrics.show(f"step {self.progress.step} | traced: {path}")
        if is_wanted:
            self.profiler.ask(self.progress.step)

    def close(self, error: BaseException | None) -> None:
        """Stop the loader, finish saves and metrics and let the next process into the folder; `error` ends the run."""
        with self.clock.phase("close"):
            self.loader.close()
            self.saver.close(error)
            if self.memory is not None:
                self.memory.close(error)
            self.profiler.close()
            if self.metrics is not None:
                self.metrics.close()
            self.alerts.flush()
        self.clock.close()
        if self.folder is not None:
            self.folder.close()


def checkpoints(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return config.run.folder / "checkpoints"


def skipped_rows_file(config: Config) -> Path:
    """Where a run notes at once, before the next checkpoint, which rows it leaves out."""
    return checkpoints(config) / "skipped_rows.json"


def read_skipped(path: Path, saved: SkippedRows) -> SkippedRows:
    """The rows that a run leaves out: those its checkpoint knows of, and those noted since.

    Raises:
        UserError: the note cannot be read.
    """
    if not path.exists():
        return saved
    try:
        noted = SkippedRows.read(json.loads(path.read_text()))
    except (ValueError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to train on rows noted since the checkpoint") from None
    return noted if noted.continues(saved) else saved


def build_run(config: Config, world: World) -> Run:
    """Open the run folder and the data, build the model and its optimizers, load the newest checkpoint. Collective.

    Raises:
        UserError: on every process, when any of them cannot go on.
    """
    check_agreement(config, world)
    mesh = build_mesh(config.parallel, world)
    data = do_together(lambda: open_data(config))
    check_same_data(data[0].dataset.fingerprint, config, world)
    folder = do_together(lambda: open_run_folder(config) if world.is_first else None)
    clock = None
    try:
        clock, alerts = do_together(lambda: open_sight(config, folder, world.began_s))
        return fill_run(config, world, mesh, data, folder, clock, alerts)
    except BaseException:
        if clock is not None:
            alerts.flush()
            clock.close()
        if folder is not None:
            folder.close()
        raise


def fill_run(
    config: Config,
    world: World,
    mesh: Mesh,
    data: tuple[TokenRows, TokenDataset | None],
    folder: RunFolder | None,
    clock: RunClock,
    alerts: Alerts,
) -> Run:
    """The rest of `build_run`, between opening the folder and the first step. Collective."""
    rows, heldout = data
    check_parameters(config.optimizer, build_stage(config, None))
    engine = build_engine(config, mesh, world)
    optimizers = build_optimizers(engine.models, config.optimizer, config.run.seed)
    decay = config.train.average_decay
    average = WeightAverage(engine.named_parameters(), decay) if decay else None
    tensors = training_tensors(engine.named_parameters(), optimizers, average)
    facts = Facts(data_facts(config, rows.dataset), config.optimizer.state_facts())
    layout = mesh.degrees | ({"ep": mesh.size("ep")} if mesh.size("ep") > 1 else {})
    memory = open_memory(config, layout, tensors, facts, clock)
    progress = resume_run(config, tensors, facts, memory)
    leave_out_rows(config, progress, world)
    kernels = choose_kernels(config, world.device)
    updated_by = optimizer_facts(config, optimizers, mesh, world.device)
    record = {
        "run": clock.run_id,
        "start": clock.start,
        "layout": layout,
        "data": facts.data,
        "resumed_at": progress.step,
        "kernels": kernels,
        "optimizer": updated_by,
    }
    tokenizer = rows.dataset.tokenizer_path
    metrics = do_together(lambda: open_record(config, folder, tokenizer, record, progress) if folder else None)
    tell_resumed(memory, metrics, clock)
    loader = open_loader(config, mesh, rows, progress)
    size = checkpoint_bytes(config, int(updated_by["state_bytes"]))
    return Run(
        config=config,
        world=world,
        engine=engine,
        optimizers=optimizers,
        average=average,
        tensors=tensors,
        loader=loader,
        heldout=heldout,
        facts=facts,
        progress=progress,
        folder=folder,
        metrics=metrics,
        clock=clock,
        alerts=alerts,
        lookout=Lookout(config.alerts, folder.path, size) if folder else None,
        profiler=StepProfiler(folder.path if folder else None, config.log.profile_steps, world.device),
        saver=Saver(config.checkpoint, checkpoints(config), tensors, facts, metrics, alerts),
        memory=memory,
        guard=open_guard(config, progress, world.device),
        copies=CopyCheck(engine.named_parameters()) if config.train.checksum_every else None,
    )


def resume_run(config: Config, tensors: dict[str, torch.Tensor], facts: Facts, memory: MemoryCopies | None) -> Progress:
    """Put the run where its newest checkpoint, or newer copies in memory, left it. Collective."""
    fresh, look = config.checkpoint.fresh_optimizer, search_memory(memory, config, skipped_rows_file(config))
    return resume_training(checkpoints(config), tensors, facts, dist.get_rank(), fresh, in_memory=look) or Progress()


def open_guard(config: Config, progress: Progress, device: torch.device) -> SpikeGuard | None:
    """What judges the losses, where spikes are looked for, with what `progress` knows of earlier ones."""
    if not config.spikes.deviations:
        return None
    guard = SpikeGuard(config.spikes, device)
    guard.load(progress.spikes)
    return guard


def leave_out_rows(config: Config, progress: Progress, world: World) -> None:
    """Have `progress` know of the rows that were left out since its checkpoint; without one there are none. Collective.

    Rank 0 reads: what others see of a shared folder may be older, and all must leave out the same.

    Raises:
        UserError: as `read_skipped`, on every process.
    """
    if progress.step:
        path, saved = skipped_rows_file(config), SkippedRows.read(progress.skipped_rows)
        skipped = first_says(lambda: read_skipped(path, saved), world.rank)
        progress.skipped_rows = [list(stretch) for stretch in skipped.stretches]
        progress.next_row = skipped.following(progress.next_row)


def open_loader(config: Config, mesh: Mesh, rows: TokenRows, progress: Progress) -> BatchLoader:
    """This rank's batches from where the run is."""
    return BatchLoader(
        rows,
        batch_rows=config.train.batch_rows // mesh.data_ranks,
        rank=mesh.data_rank,
        world_size=mesh.data_ranks,
        start=progress.next_row,
        prefetch=config.data.prefetch,
        skipped=SkippedRows.read(progress.skipped_rows),
    )


def open_data(config: Config) -> tuple[TokenRows, TokenDataset | None]:
    """The training rows and, where the run evaluates, the held-out split, checked against tokenizer and vocabulary.

    Raises:
        UserError: the data is damaged or does not fit.
    """
    data = TokenDataset(config.data.folder, "train")
    heldout = TokenDataset(config.data.folder, "heldout") if config.eval.every_steps else None
    check_tokenizer(data, Tokenizer.load(data.tokenizer_path))
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is below the {data.vocab_size} pieces of the tokenizer in "
            f"{config.data.folder}; set model.vocab_size={data.vocab_size} or more"
        )
    return TokenRows(data, config.data.seq_len, config.data.seed), heldout


def open_record(
    config: Config, folder: RunFolder, tokenizer: Path, facts: dict[str, Any], progress: Progress
) -> Metrics:
    """Write what this start runs with into the run folder, and open its metrics where `progress` left them.

    Raises:
        UserError: wandb cannot be reached.
    """
    write_record(folder, config, facts)
    folder.stopped.unlink(missing_ok=True)
    shutil.copyfile(tokenizer, folder.path / "tokenizer.model")
    cut_metrics(folder.metrics, progress.step)
    metrics = Metrics(config, folder.metrics, facts["run"], facts["start"], progress.step)
    if progress.step < config.train.steps:
        metrics.start(progress.step, progress.tokens, facts["kernels"], facts["optimizer"])
    return metrics


def data_facts(config: Config, data: TokenDataset) -> dict[str, Any]:
    """What fixes the order of the data; a run may only be resumed with the same."""
    return {
        "fingerprint": data.fingerprint,
        "tokenizer_hash": data.tokenizer_hash,
        "seed": config.data.seed,
        "seq_len": config.data.seq_len,
        "batch_rows": config.train.batch_rows,
    }


def optimizer_facts(
    config: Config, optimizers: list[Optimizer], mesh: Mesh, device: torch.device
) -> dict[str, str | int | float]:
    """What updates the parameters and how many bytes it keeps, for the record. Collective over pipeline stages."""
    size = state_size(optimizers)
    whole = torch.tensor(size.whole, device=device)
    if mesh.size("pp") > 1:
        dist.all_reduce(whole, group=mesh.group("pp"))
    return {
        "name": config.optimizer.words,
        "state_bytes_here": size.here,
        "state_bytes": int(whole),
        "state_bytes_per_parameter": int(whole) / config.model.num_params(),
    }


def checkpoint_bytes(config: Config, state_bytes: int) -> int:
    """Bytes of all tensors of a checkpoint whose optimizers keep `state_bytes`."""
    averaged = 4 * config.model.num_params() if config.train.average_decay else 0
    return parameter_bytes(config) + state_bytes + averaged
