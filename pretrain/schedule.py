"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then a cosine, or a constant with a linear decay at the end (WSD, arXiv:2404.06395 section 4).

    Attributes:
        kind: `cosine`, or `wsd` (warm-up, stable, decay).
        warmup_steps: steps of linear rise from zero.
        decay_fraction: share of all steps in the final decay of `wsd`.
        final_ratio: learning rate at the last step over its peak.
    """

    kind: Literal["cosine", "wsd"] = "wsd"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_ratio: float = 0.0

    def problems(self, total_steps: int) -> list[str]:
        """Every field out of range for a run of `total_steps`."""
        found = []
        if not 0 <= self.warmup_steps <= total_steps:
            found.append(f"schedule.warmup_steps={self.warmup_steps} must be between 0 and train.steps={total_steps}")
        if not 0.0 <= self.decay_fraction <= 1.0:
            found.append(f"schedule.decay_fraction={self.decay_fraction} must be between 0 and 1")
        if not 0.0 <= self.final_ratio <= 1.0:
            found.append(f"schedule.final_ratio={self.final_ratio} must be between 0 and 1")
        return found

    def scale(self, step: int, total_steps: int) -> float:
        """The factor on every peak learning rate for update number `step` (from 1 to `total_steps`)."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, done))))
        else:
            decay_steps = max(1.0, self.decay_fraction * total_steps)
            shape = min(1.0, (total_steps - step) / decay_steps)
        return warmup * (self.final_ratio + (1.0 - self.final_ratio) * shape)
