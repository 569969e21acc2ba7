"""Whether a model, and its rows, can be spread as a layout asks: every mismatch at once, before any process starts."""

import torch

from ..model.config import ModelConfig
from ..model.layer import divisors
from ..model.rules import ShardRule
from .config import ParallelConfig

# Units that every tensor-parallel rank needs its own share of. Groups and KV heads are copied where there are fewer.
SHARED_OUT = ("heads", "hidden", "vocabulary")


def fit_problems(config: ParallelConfig, model: ModelConfig, seq_len: int) -> list[str]:
    """Every degree that heads, hidden widths, vocabulary, layers or row length do not allow, with what they would.

    Both configurations must be valid by themselves.
    """
    return [*_tp_problems(config.tp, model), *_pp_problems(config, model), *_cp_problems(config, seq_len)]


def _tp_problems(tp: int, model: ModelConfig) -> list[str]:
    if tp == 1:
        return []
    found = []
    for kind in dict.fromkeys(model.kinds):
        with torch.device("meta"):
            layer = getattr(model, kind).build(model.d_model, model.norm_eps, 0)
        found += [_misfit(f"model.{kind}", tp, rule.shard) for rule in layer.parameter_rules.values()]
    found.append(_misfit("model", tp, ShardRule(0, "vocabulary", model.vocab_size)))
    return [line for line in dict.fromkeys(found) if line]


def _misfit(where: str, tp: int, shard: ShardRule) -> str:
    if shard.unit not in SHARED_OUT or shard.count % tp == 0:
        return ""
    name = {"heads": "num_heads", "hidden": "d_hidden", "vocabulary": "vocab_size"}[shard.unit]
    nearest = -(-shard.count // tp) * tp
    return (
        f"parallel.tp={tp} does not divide {where}.{name}={shard.count}; "
        f"use tp in {{{_short(divisors(shard.count))}}}, or {name}={nearest}"
    )


def _short(numbers: str) -> str:
    return numbers if len(numbers) <= 60 else numbers[: numbers.rindex(",", 0, 60)] + ", ..."


def _pp_problems(config: ParallelConfig, model: ModelConfig) -> list[str]:
    layers = len(model.kinds)
    if config.num_stages <= layers:
        return []
    return [
        f"parallel.pp={config.pp} x pp_stages={config.pp_stages} makes {config.num_stages} stages, "
        f"but model.pattern has only {layers} layers; lower pp or pp_stages"
    ]


def _cp_problems(config: ParallelConfig, seq_len: int) -> list[str]:
    if config.num_segments <= seq_len:
        return []
    return [
        f"parallel.cp={config.cp} (layout {config.cp_layout}, cp_virtual={config.cp_virtual}) cuts a row into "
        f"{config.num_segments} segments, more than data.seq_len={seq_len} tokens; lower cp or cp_virtual"
    ]
