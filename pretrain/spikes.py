"""Losses that jump: what a spike is, judged on the device, and what the host learns of it a step later."""

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..parallel.comm import sum_over_ranks

# Of the median: losses that hardly vary would make a spike of every small step up.
LEAST_DEVIATION = 0.01


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """What happens when the loss jumps, or gradients are not finite.

    Attributes:
        deviations: a loss is a spike where it is above the median of the last losses by more than this many times their
            median absolute deviation (or 1% of the median, where that is more); 0 turns all of this off.
        window: losses that are compared with, spikes aside; until there are so many, only non-finite ones are spikes.
        patience: spikes in a row, each of them skipped, after which the run goes back to the newest checkpoint from
            before them, and leaves out the rows in between.
        rewinds_limit: how often the whole run may do so.
    """

    deviations: float = 0.0
    window: int = 128
    patience: int = 5
    rewinds_limit: int = 3

    def problems(self, nonfinite_limit: int) -> list[str]:
        """Every field out of range, or, where spikes are looked for, beyond `train.nonfinite_limit`."""
        found = [
            f"spikes.{name}={getattr(self, name)} must be at least {low}"
            for name, low in (("deviations", 0), ("window", 2), ("patience", 1), ("rewinds_limit", 0))
            if getattr(self, name) < low
        ]
        if self.deviations and self.patience > nonfinite_limit:
            found.append(
                f"spikes.patience={self.patience} is above train.nonfinite_limit={nonfinite_limit}, "
                "which would end the run first; lower one or raise the other"
            )
        return found


@dataclass(frozen=True)
class Judged:
    """What became of a step.

    Attributes:
        step: its number.
        end_row: the row behind its rows.
        loss: nats per token over all ranks.
        limit: what the loss was allowed to be; infinite until the window is full.
        grad_norm: before clipping.
        in_a_row: spikes up to and with this step, 0 where it is none.
    """

    step: int
    end_row: int
    loss: float
    limit: float
    grad_norm: float
    in_a_row: int

    def record(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        numbers = {"loss": self.loss, "limit": self.limit, "grad_norm": self.grad_norm}
        return {
            "step": self.step,
            **{key: number if math.isfinite(number) else None for key, number in numbers.items()},
            "in_a_row": self.in_a_row,
        }


@dataclass
class LateNumbers:
    """Small device tensors that the host reads a step after they were computed, when they have long arrived."""

    under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=deque)

    def send(self, numbers: Tensor) -> None:
        """Begin to copy; the host does not wait."""
        if numbers.device.type != "cuda":
            self.under_way.append((numbers, None))
            return
        there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.under_way.append((there, arrived))

    def take(self) -> list[float]:
        """The oldest that were sent; waits for the device to have come so far."""
        numbers, arrived = self.under_way.popleft()
        if arrived is not None:
            arrived.synchronize()
        return numbers.tolist()


class SpikeGuard:
    """Judges the loss of every step by those before it, the same on all ranks.

    All of it is computed on the device from numbers summed over all ranks: one all-reduce of two numbers a step. The
    host learns what became of a step when the next one has been launched, so it never runs ahead of the device by more
    than one step.
    """

    def __init__(self, config: SpikesConfig, device: torch.device) -> None:
        self.config = config
        self.loss_sum = torch.zeros((), device=device)
        self._history = torch.zeros(config.window, device=device)
        self._places = torch.arange(config.window, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._numbers = LateNumbers()
        self._steps: deque[tuple[int, int]] = deque()
        self._spike: list[Judged] = []

    def judge(self, loss_sum: Tensor, targets: int, norm: Tensor, step: int, end_row: int) -> Tensor:
        """1 where the update is to be skipped, a float32 scalar on the device. Collective, no host synchronisation.

        Args:
            loss_sum: this rank's share of the summed loss; the sum over ranks is left in `self.loss_sum`.
            targets: of all ranks.
            norm: of the gradients, before clipping.
            step: the number of the update.
            end_row: the row behind those of this step.
        """
        broken = (~norm.isfinite()).to(loss_sum.dtype)
        self.loss_sum, broken = sum_over_ranks(torch.stack([loss_sum, broken])).unbind()
        loss = (self.loss_sum / max(1, targets)).float()
        limit = self._limit()
        is_fine = (loss <= limit) & loss.isfinite() & (broken == 0)
        is_here = (self._places == self._count % self.config.window) & is_fine
        self._history = torch.where(is_here, loss, self._history)
        self._count = self._count + is_fine
        self._in_a_row = (self._in_a_row + 1) * ~is_fine
        self._numbers.send(torch.stack([n.double() for n in (loss, limit, norm, self._in_a_row)]))
        self._steps.append((step, end_row))
        return (~is_fine).float()

    def _limit(self) -> Tensor:
        middle = (self.config.window - 1) // 2
        median = self._history.sort().values[middle]
        deviation = (self._history - median).abs().sort().values[middle]
        limit = median + self.config.deviations * torch.maximum(deviation, LEAST_DEVIATION * median.abs())
        return torch.where(self._count >= self.config.window, limit, torch.inf)

    def take(self, settle: bool) -> list[Judged]:
        """The spikes among the steps that the host now learns of: all but the last step, or with `settle` that too."""
        found: list[Judged] = []
        # Whatever came after a spike that lasted is undone, whenever the host learns of it.
        while len(self._steps) > (0 if settle else 1) and not self.lasting:
            (step, end_row), (loss, limit, norm, in_a_row) = self._steps.popleft(), self._numbers.take()
            judged = Judged(step, end_row, loss, limit, norm, int(in_a_row))
            if judged.in_a_row:
                found.append(judged)
            self._spike = [*self._spike, judged] if judged.in_a_row else []
        return found

    @property
    def lasting(self) -> list[Judged]:
        """The steps of a spike that has lasted for `patience` steps; empty where there is none."""
        return self._spike if len(self._spike) >= self.config.patience else []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; to be asked for when all steps are settled. Waits for the device."""
        assert not self._steps
        return {
            "history": self._history.tolist(),
            "count": int(self._count),
            "in_a_row": int(self._in_a_row),
            "spike": [{key: str(value) for key, value in asdict(judged).items()} for judged in self._spike],
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`; from the beginning where there is none, or one of another window."""
        self._numbers, self._steps, self._spike = LateNumbers(), deque(), []
        for tensor in (self._history, self._count, self._in_a_row):
            tensor.zero_()
        if state is None or len(state["history"]) != self.config.window:
            return
        self._history.copy_(torch.tensor(state["history"]))
        self._count.fill_(state["count"])
        self._in_a_row.fill_(state["in_a_row"])
        # As text, since JSON has no infinite numbers.
        self._spike = [
            Judged(
                step=int(saved["step"]),
                end_row=int(saved["end_row"]),
                loss=float(saved["loss"]),
                limit=float(saved["limit"]),
                grad_norm=float(saved["grad_norm"]),
                in_a_row=int(saved["in_a_row"]),
            )
            for saved in state["spike"]
        ]
