"""One configuration for a run: the tables of every folder, joined, read from TOML and checked as a whole."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from ..data.config import DataConfig
from ..errors import UserError
from ..model.config import ModelConfig
from ..parallel.config import ParallelConfig
from ..parallel.fit import fit_problems
from ..parallel.pulse import WatchConfig
from ..parallel.recompute import Recompute
from ..parallel.stages import pipeline_problems
from .alerts import AlertConfig
from .config_io import apply_overrides, build, format_toml, read_toml, to_tables
from .optimizers.config import OptimizerConfig
from .schedule import ScheduleConfig
from .spikes import SpikesConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Who this run is.

    Attributes:
        name: of the run and of its folder.
        root: where run folders lie.
        seed: of first values and of whatever else is random but the order of the data.
    """

    name: str
    root: str = "runs"
    seed: int = 1

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.name

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name.startswith("."):
            found.append(f"run.name={self.name!r} must be letters, digits, '.', '_' or '-', not starting with '.'")
        if not 0 <= self.seed < 2**63:
            found.append(f"run.seed={self.seed} must be between 0 and 2^63-1")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The size of a step and how it is computed.

    Attributes:
        steps: updates of the whole run.
        batch_rows: rows in one update, over all processes.
        micro_batch_rows: rows one process takes through the model at a time; 0 takes its whole share. The last time
            may take fewer.
        clip_norm: gradients are scaled down to this global norm; 0 leaves them.
        precision: `auto` is bfloat16 on CUDA and float32 elsewhere, for the products.
        weights: dtype in which weights and gradients are kept; with bfloat16, recurrences' own parameters and routers
            stay float32, and AdamW keeps a float32 copy of what has 32-bit moments.
        recompute: which activations a block recomputes in backward.
        compile: compile each block with torch.compile.
        kernels: what computes the operators: `triton`, `torch`, the `reference` definitions (slow), or `auto`, which is
            Triton on GPUs and PyTorch elsewhere.
        nonfinite_limit: a record (`log.every_steps`) whose last updates, so many in a row, were all skipped for a
            non-finite gradient ends the run.
        average_decay: of an exponential moving average of the weights, which `eval`, `export` and `generate` take with
            `--average`; 0 keeps none.
        checksum_every: steps between two comparisons of the parameters that several processes hold copies of, bit for
            bit; before each save and copy in memory too. 0 compares none.
    """

    steps: int
    batch_rows: int
    micro_batch_rows: int = 0
    clip_norm: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["float32", "bfloat16"] = "float32"
    recompute: Recompute = "none"
    compile: bool = False
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    nonfinite_limit: int = 10
    average_decay: float = 0.0
    checksum_every: int = 0

    def problems(self, data_ranks: int | None = None) -> list[str]:
        """Every field out of range, or, for a known number of data-parallel ranks, that does not fit it."""
        found = [
            f"train.{name}={getattr(self, name)} must be at least {low}"
            for name, low in (
                ("steps", 1),
                ("batch_rows", 1),
                ("micro_batch_rows", 0),
                ("nonfinite_limit", 1),
                ("checksum_every", 0),
            )
            if getattr(self, name) < low
        ]
        if self.clip_norm < 0:
            found.append(f"train.clip_norm={self.clip_norm} must not be negative")
        if not 0.0 <= self.average_decay < 1.0:
            found.append(f"train.average_decay={self.average_decay} must be at least 0 and below 1")
        if found or not data_ranks:
            return found
        if self.batch_rows % data_ranks:
            below, above = self.batch_rows // data_ranks * data_ranks, -(-self.batch_rows // data_ranks) * data_ranks
            choice = " or ".join(str(n) for n in (below, above) if n)
            return [
                f"train.batch_rows={self.batch_rows} does not split over {data_ranks} data-parallel ranks; use {choice}"
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation.

    Attributes:
        every_steps: updates between evaluations during training; 0 turns them off.
        max_tokens: held-out tokens read each time, whole documents; 0 reads all.
        window: tokens scored in one forward pass; a document goes on from window to window with its state.
        max_keys: tokens before a window that attention layers still see; 0 keeps all. Recurrent states always go on.
            Attention trained on short rows does worse, not better, with far more keys than a row has.
    """

    every_steps: int = 0
    max_tokens: int = 0
    window: int = 1024
    max_keys: int = 0

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = [
            f"eval.{name}={getattr(self, name)} must not be negative"
            for name in ("every_steps", "max_tokens", "max_keys")
            if getattr(self, name) < 0
        ]
        if self.window < 1:
            found.append(f"eval.window={self.window} must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to go on from.

    Attributes:
        every_steps: steps between two checkpoints; 0 saves only at the end, or as `time_share` says.
        time_share: share of the time that saves may cost; how far they are apart then follows from what they have cost,
            and from `failure_every_s`. 0: `every_steps` alone counts.
        failure_every_s: expected seconds between two failures of the machines.
        keep_last: newest checkpoints that stay.
        fresh_optimizer: whether a run goes on from a checkpoint that another optimizer saved, with the weights and the
            place in the data, and begins the optimizer's state anew. Where the optimizer is the same this does nothing.
        other_code: whether a run goes on with other code (or another PyTorch) than its last start had.
        asynchronous: whether training goes on while a periodic checkpoint is written, from a copy in host memory.
        retries: how often a save that the disk did not take is tried again, after 1, 2, 4, ... seconds.
        failures_limit: the run ends with so many failed periodic saves in a row.
        memory_every_steps: steps between two copies of the state in memory, each on its machine and on another one; a
            start after a crash goes on from them where they are newer than the newest checkpoint. 0 makes none.
        memory_folder: where these lie: a folder on every machine that outlives processes, of this user alone.
    """

    every_steps: int = 0
    time_share: float = 0.0
    failure_every_s: float = 21600.0
    keep_last: int = 2
    fresh_optimizer: bool = False
    other_code: bool = False
    asynchronous: bool = True
    retries: int = 3
    failures_limit: int = 3
    memory_every_steps: int = 0
    memory_folder: str = "/dev/shm/headrace"

    @property
    def is_periodic(self) -> bool:
        """Whether there are saves before the end."""
        return self.every_steps > 0 or self.time_share > 0

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if not 0.0 <= self.time_share <= 0.5:
            found.append(f"checkpoint.time_share={self.time_share} must be between 0 and 0.5")
        elif self.time_share and self.every_steps:
            found.append("checkpoint.every_steps and checkpoint.time_share both say when to save; set one of them to 0")
        if self.failure_every_s <= 0:
            found.append(f"checkpoint.failure_every_s={self.failure_every_s} must be above 0")
        if self.memory_every_steps < 0:
            found.append(f"checkpoint.memory_every_steps={self.memory_every_steps} must not be negative")
        if self.memory_every_steps > 0 and 0 < self.every_steps <= self.memory_every_steps:
            found.append(
                f"checkpoint.memory_every_steps={self.memory_every_steps} must be below "
                f"checkpoint.every_steps={self.every_steps}, or 0: copies no newer than a checkpoint are of no use"
            )
        if not Path(self.memory_folder).is_absolute():
            found.append(f"checkpoint.memory_folder={self.memory_folder} must be an absolute path, as /dev/shm/NAME")
        if self.retries < 0:
            found.append(f"checkpoint.retries={self.retries} must not be negative")
        if self.failures_limit < 1:
            found.append(f"checkpoint.failures_limit={self.failures_limit} must be at least 1")
        if self.every_steps < 0:
            found.append(f"checkpoint.every_steps={self.every_steps} must not be negative")
        if self.keep_last < 1:
            found.append(f"checkpoint.keep_last={self.keep_last} must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written of a run while it goes.

    Attributes:
        every_steps: steps between two lines and records.
        wandb: whether records go to Weights & Biases too, at once or to a folder of it (`headrace[wandb]`).
        tensorboard: whether they go to TensorBoard too, in `tensorboard/` of the run folder (`headrace[tensorboard]`).
        profile_steps: steps that the file `PROFILE` has traced.
    """

    every_steps: int = 10
    wandb: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False
    profile_steps: int = 3

    def problems(self) -> list[str]:
        """Every field out of range."""
        return [
            f"log.{name}={getattr(self, name)} must be at least 1"
            for name in ("every_steps", "profile_steps")
            if getattr(self, name) < 1
        ]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    alerts: AlertConfig = field(default_factory=AlertConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def _weight_problems(self) -> list[str]:
        found = []
        kind, narrow = self.optimizer.kind, self.train.weights == "bfloat16"
        if narrow and kind != "adamw":
            found.append(f"train.weights=bfloat16 loses {kind}'s small updates; use float32, or optimizer.kind=adamw")
        if narrow and self.train.precision == "float32":
            found.append("train.weights=bfloat16 does not go with train.precision=float32; use bfloat16")
        if self.optimizer.stochastic_rounding and not (narrow and self.optimizer.state_bits == 8):
            found.append(
                "optimizer.stochastic_rounding is for bfloat16 weights with 8-bit moments; "
                "set train.weights=bfloat16 and optimizer.state_bits=8"
            )
        return found

    def _rewind_problems(self) -> list[str]:
        if self.spikes.deviations and self.checkpoint.time_share:
            return [
                "spikes.deviations goes back to checkpoints, and with checkpoint.time_share where they are depends on "
                "time, the result too; use checkpoint.every_steps"
            ]
        return []

    def problems(self, world_size: int | None = None) -> list[str]:
        """Everything wrong with this configuration, for `world_size` processes where that is known."""
        data_ranks = None if world_size is None else self.parallel.data_ranks(world_size)
        parts = [self.model.problems(), self.data.problems(), self.train.problems(data_ranks)]
        misfits: list[str] = []
        if not any(parts) and not self.parallel.problems():
            misfits = fit_problems(self.parallel, self.model, self.data.seq_len)
            if data_ranks and self.parallel.pp > 1:
                rows = self.train.batch_rows // data_ranks
                misfits += pipeline_problems(
                    self.parallel,
                    rows,
                    self.train.micro_batch_rows or rows,
                    recompute=self.train.recompute,
                    compiled=self.train.compile,
                )
        return [
            *self.run.problems(),
            *chain.from_iterable(parts),
            *self.parallel.problems(world_size),
            *misfits,
            *self._weight_problems(),
            *self._rewind_problems(),
            *self.optimizer.problems(),
            *(self.schedule.problems(self.train.steps) if self.train.steps > 0 else []),
            *self.eval.problems(),
            *self.checkpoint.problems(),
            *self.log.problems(),
            *self.alerts.problems(),
            *self.spikes.problems(self.train.nonfinite_limit),
            *self.watch.problems(),
        ]

    def to_toml(self) -> str:
        """TOML text that `load_config` reads back to an equal configuration."""
        return format_toml(to_tables(self))

    def differences(self, other: "Config", tables: Iterable[str]) -> list[str]:
        """Lines `table.key: mine -> theirs` for each value in `tables` that differs."""
        lines: list[str] = []
        for table in tables:
            _compare(to_tables(getattr(self, table)), to_tables(getattr(other, table)), table, lines)
        return lines


def _compare(mine: dict, theirs: dict, where: str, lines: list[str]) -> None:
    for key in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _compare(a, b, f"{where}.{key}", lines)
        elif a != b:
            lines.append(f"{where}.{key}: {a} -> {b}")


def load_config(path: Path, overrides: Iterable[str] = (), world_size: int | None = None) -> Config:
    """The configuration in a TOML file with `section.key=value` overrides applied, fully checked.

    Raises:
        UserError: lists every unknown key, wrong type and value out of range at once.
    """
    tables = apply_overrides(read_toml(path), overrides)
    errors: list[str] = []
    config = build(Config, tables, errors)
    if config is not None:
        errors += config.problems(world_size)
    if errors or config is None:
        listed = errors[0] if len(errors) == 1 else "\n  ".join([f"{len(errors)} mistakes", *errors])
        raise UserError(f"{path}: {listed}", everywhere=True)
    return config
