"""Where the numbers of a run go: a progress line, `metrics.jsonl`, wandb and TensorBoard when they are asked for."""

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..errors import UserError, file_error
from .config import Config
from .memory import name_ranks
from .run_folder import cut_metrics
from .tensorboard import TensorBoard

# Records that a full disk may keep waiting, some 50 MB.
MOST_WAITING = 200_000


class Metrics:
    """Writes each record to `metrics.jsonl`, to the terminal and, when turned on, to wandb and TensorBoard.

    Used on rank 0 only.

    Args:
        config: of the run.
        path: the file of records.
        run_id: the same over all starts of the run.
        start: number of this start.
        step: where the run goes on.
    """

    def __init__(self, config: Config, path: Path, run_id: str = "", start: int = 1, step: int = 0) -> None:
        self.total_steps = config.train.steps
        self.identity = {"run": run_id, "start": start}
        self.tensorboard = TensorBoard(config.run.folder, step) if config.log.tensorboard else None
        self.file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()  # lines that are not yet in the file,
        self._begun = 0  # and how many bytes of the first are
        self.wandb = _start_wandb(config, run_id or config.run.name) if config.log.wandb != "off" else None
        self.last_step = 0

    def start(self, step: int, tokens: int, kernels: str, optimizer: dict[str, Any]) -> None:
        """The run starts, or goes on, after `step`, with operators computed by `kernels` and this `optimizer`."""
        names = {"torch": "PyTorch", "triton": "Triton", "reference": "the definitions"}
        self.show(f"operators by {names[kernels]}")
        self.show(f"{optimizer['name']}: {optimizer['state_bytes_per_parameter']:.2f} bytes of state a parameter")
        record = {"kind": "start", "step": step, **self.identity, "tokens": tokens}
        self._write({**record, "kernels": kernels, "optimizer": optimizer})

    def train(self, record: dict[str, Any], seconds_left: float) -> None:
        """One update's record (see docs/metrics.md for its keys)."""
        skipped = f" | skipped {record['skipped']}" if record["skipped"] else ""
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        self.show(
            f"step {record['step']:>{len(str(self.total_steps))}}/{self.total_steps} | loss {loss} | "
            f"{record['tokens_per_s']:,.0f} tokens/s | {_clock(seconds_left)} left{skipped}"
        )
        self._write({"kind": "train", **record})

    def routing(self, step: int, record: dict[str, Any], warning: str | None) -> None:
        """The health of routing since the record before, and a line to show when experts have died."""
        if warning:
            self.show(f"step {step} | {warning}")
        self._write({"kind": "routing", "step": step, **record})

    def evaluation(self, record: dict[str, Any]) -> None:
        """One held-out evaluation's record."""
        self.show(f"step {record['step']} | held out: {record['bits_per_byte']:.4f} bits per byte")
        self._write({"kind": "eval", **record})

    def save(self, record: dict[str, Any]) -> None:
        """A checkpoint was saved (see docs/metrics.md)."""
        self._write({"kind": "save", **record})

    def save_failed(self, record: dict[str, Any]) -> None:
        """A try to save a checkpoint failed, and whether another follows."""
        then = f"tried again in {record['wait_s']:g} s" if record["wait_s"] is not None else "given up"
        self.show(f"step {record['step']} | try {record['attempt']} to save failed: {record['reason']}; {then}")
        self._write({"kind": "save_failed", **record})

    def unsaved(self, step: int, failures: int, limit: int) -> None:
        """The checkpoint of `step` was given up, and training goes on."""
        self.show(
            f"step {step} | WARNING: NO CHECKPOINT WAS SAVED, {failures} time{'s' * (failures > 1)} in a row; training "
            f"goes on, and ends if it comes to {limit} (checkpoint.failures_limit): make room, or see to the disk"
        )

    def memory(self, record: dict[str, Any]) -> None:
        """A copy of the state is in memory (see docs/metrics.md)."""
        self._write({"kind": "memory", **record})

    def memory_failed(self, step: int, reason: str) -> None:
        """The copy of the state of `step` could not be made, and training goes on."""
        self.show(f"step {step} | WARNING: no copy in memory was made: {reason}; training goes on")
        self._write({"kind": "memory_failed", "step": step, "reason": reason})

    def memory_resume(self, step: int, from_peers: list[int]) -> None:
        """The run goes on from copies in memory of `step`, those of some ranks from where their peers kept them."""
        peers = f", {name_ranks(from_peers)} from {'its peer' if len(from_peers) == 1 else 'their peers'}"
        self.show(f"resumed from memory of step {step}{peers if from_peers else ''}")
        self._write({"kind": "memory_resume", "step": step, "from_peers": from_peers})

    def spike(self, record: dict[str, Any]) -> None:
        """An update was skipped because its loss jumped or its gradient was not finite (see docs/metrics.md)."""
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        above = "" if record["limit"] is None else f", limit {record['limit']:.4f}"
        norm = ", gradient not finite" if record["grad_norm"] is None else ""
        row = f" ({record['in_a_row']} in a row)" if record["in_a_row"] > 1 else ""
        self.show(f"step {record['step']} | spike: loss {loss}{above}{norm}; the update is skipped{row}")
        self._write({"kind": "spike", **record})

    def rewind(self, path: Path, record: dict[str, Any]) -> None:
        """The run went back to the checkpoint of `step`; records at `path` after it are dropped, as on a restart."""
        self.file.close()
        cut_metrics(path, record["step"])
        self.file = path.open("ab", buffering=0)
        kept = (line for line in self._waiting if json.loads(line)["step"] <= record["step"])
        self._waiting, self._begun = deque(kept), 0
        (first, last), (row, end) = record["spike"], record["rows"]
        self.show(
            f"step {record['step']} | rewound: the spike of steps {first} to {last} lasted; the run goes on from the "
            f"checkpoint of step {record['step']} without rows {row} to {end - 1} (rewind {record['rewinds']})"
        )
        self._write({"kind": "rewind", **record})

    def slow_rank(self, record: dict[str, Any]) -> None:
        """A process makes the others wait (see docs/metrics.md)."""
        self.show(
            f"step {record['step']} | rank {record['rank']} ({record['host']}) is slow: it works "
            f"{record['own_s']:.3g} s of a step itself, the others {record['others_s']:.3g} s"
        )
        self._write({"kind": "slow_rank", **record})

    def stop(self, step: int, reason: str) -> None:
        """The run stops after `step` because it was asked to."""
        self.show(f"step {step} | stopped by {reason}; the checkpoint is saved, the same command goes on from it")
        self._write({"kind": "stop", "step": step, "reason": reason})

    def close(self) -> None:
        """Finish the files."""
        if fault := self._put():
            self.show(f"WARNING: {len(self._waiting)} records are lost: {self._cannot(fault)}")
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def show(self, line: str) -> None:
        """A line on the terminal, with the time of day."""
        stamp = time.strftime("%H:%M:%S")
        print(f"{stamp} {line}", file=sys.stderr, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._waiting.append((json.dumps(record) + "\n").encode())
        if (fault := self._put()) and (record["kind"] == "start" or len(self._waiting) > MOST_WAITING):
            raise file_error(self._cannot(fault), fault)
        if fault and len(self._waiting) == 1:
            self.show(f"WARNING: {self._cannot(fault)}; records wait, and training goes on")
        if self.wandb is not None:
            # A save is on record under its own step when it is done; wandb's steps never go back.
            self.last_step = max(self.last_step, record["step"])
            self.wandb.log(_scalars(record), step=self.last_step)
        if self.tensorboard is not None:
            self.tensorboard.write(_scalars(record), record["step"])

    def _put(self) -> OSError | None:
        """Write what waits, in order; why that cannot be done, where it cannot: a full disk costs no training."""
        while self._waiting:
            try:
                self._begun += self.file.write(self._waiting[0][self._begun :])
            except OSError as error:
                return error
            if self._begun == len(self._waiting[0]):
                self._waiting.popleft()
                self._begun = 0
        return None

    def _cannot(self, fault: OSError) -> str:
        return f"{self.file.name} cannot be written: {fault.strerror or fault}"


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """A record's values as `kind/key`; of lists over layers one value a layer, `kind/key/layer_3`, and no finer."""
    kind, layers = record["kind"], record.get("layers", [])
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in ("kind", "step", "layers"):
            continue
        if not isinstance(value, list):
            found[f"{kind}/{key}"] = value
            continue
        if not layers:  # a list over something else
            continue
        for layer, entry in zip(layers, value, strict=True):
            if not isinstance(entry, list):
                found[f"{kind}/{key}/layer_{layer}"] = entry
    return found


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _start_wandb(config: Config, run_id: str) -> Any:
    """A wandb run that shows the run's name, the same one over restarts.

    Raises:
        UserError: wandb is not installed, or cannot be reached.
    """
    try:
        import wandb
    except ImportError:
        raise UserError('log.wandb is on but wandb is not installed; pip install "headrace[wandb]"') from None
    try:
        return wandb.init(
            project="headrace",
            name=config.run.name,
            id=run_id,
            dir=str(config.run.folder),
            mode="offline" if config.log.wandb == "offline" else "online",
            resume="allow",
            settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "30")), silent=True),
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'wandb cannot be reached ({reason}); set log.wandb="offline" and sync the run later') from None
