"""What the Mamba-2 layers of all stock classes have in common: their limits and their options."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import UserError
from ...model.config import ModelConfig

# JSON has no infinity: a step size above this does not occur.
NO_UPPER_LIMIT = 1e30


def kind_problems(config: ModelConfig, known: Collection[str]) -> list[str]:
    """A problem for each kind of layer that the stock class does not have."""
    return [
        f"{kind} layers (leave them out of model.pattern)" for kind in dict.fromkeys(config.kinds) if kind not in known
    ]


def pair_problems(config: ModelConfig, ffns: Collection[str]) -> list[str]:
    """Classes whose layers are a mixer and a feed-forward of kind `ffns`."""
    mixers, followers = config.kinds[::2], config.kinds[1::2]
    if len(mixers) == len(followers) and set(followers) <= set(ffns) and not set(mixers) & set(ffns):
        return []
    return [f'model.pattern="{config.pattern}" (follow every mixer with one {" or ".join(ffns)})']


def mamba2_problems(config: ModelConfig) -> list[str]:
    """Options of Mamba-2 that no stock class has; nothing when the model has no such layer."""
    if "mamba2" not in config.kinds:
        return []
    mamba = config.mamba2
    problems = []
    if mamba.skip != "head":
        problems.append(f'model.mamba2.skip="{mamba.skip}" (use "head")')
    if mamba.gated_norm == "none" or (mamba.gated_norm == "whole" and mamba.num_groups > 1):
        problems.append(f'model.mamba2.gated_norm="{mamba.gated_norm}" (use "group")')
    if mamba.norm_before_gate:
        problems.append("model.mamba2.norm_before_gate=true (use false)")
    return problems


def expand_problems(config: ModelConfig) -> list[str]:
    """Classes that compute the inner width from the model's want a whole number of times."""
    inner = config.mamba2.heads(config.d_model) * config.mamba2.head_dim
    if "mamba2" not in config.kinds or inner % config.d_model == 0:
        return []
    return [f"model.mamba2 of {inner} channels beside d_model={config.d_model} (use a multiple of d_model)"]


def attention_scale_problems(config: ModelConfig) -> list[str]:
    """Classes whose scores are scaled by head_dim ** -0.5 only."""
    scale = config.attention.softmax_scale
    usual = config.attention.width(config.d_model) ** -0.5
    if "attention" not in config.kinds or scale is None or math.isclose(scale, usual, rel_tol=1e-6):
        return []
    return [f"model.attention.softmax_scale={scale} (leave it out)"]


def has_step_limits(config: ModelConfig) -> bool:
    """Whether step sizes are clamped. The stock classes forget that when they decode from a cache."""
    return "mamba2" in config.kinds and config.mamba2.dt_limit != (0.0, math.inf)


def time_step_limit(config: ModelConfig) -> dict[str, list[float]]:
    """The field for the bounds of the step size, where there are any."""
    low, high = config.mamba2.dt_limit
    return {"time_step_limit": [low, min(high, NO_UPPER_LIMIT)]} if has_step_limits(config) else {}


def dt_limit(low: float, high: float) -> tuple[float, float]:
    """Our bounds of the step size, from stock ones."""
    return (0.0 if low <= 1 / NO_UPPER_LIMIT else float(low), math.inf if high >= NO_UPPER_LIMIT else float(high))


def expect(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `UserError` where a field of a config.json is there with another value than the one we compute with."""
    wrong = [
        f"{key}={fields[key]!r} (only {value!r})" for key, value in wanted.items() if fields.get(key, value) != value
    ]
    if wrong:
        raise UserError(f"this {fields.get('model_type')} model uses what headrace does not offer: {', '.join(wrong)}")


def counted(kinds: list[str]) -> str:
    """A pattern with runs counted: `3*mamba2 attention`."""
    words: list[list[Any]] = []
    for kind in kinds:
        if words and words[-1][0] == kind:
            words[-1][1] += 1
        else:
            words.append([kind, 1])
    return " ".join(kind if count == 1 else f"{count}*{kind}" for kind, count in words)
