"""Whether a model, and its rows, can be spread as a layout asks: every mismatch at once, before any process starts."""

import torch

from ..model.config import ModelConfig
from ..model.layer import divisors
from ..model.rules import ShardRule
from .config import ParallelConfig

# Units that every tensor-parallel rank needs its own share of, and what sets their number. Groups and KV heads are
# copied where there are fewer.
SHARED_OUT = {"heads": "num_heads", "channels": "expand*d_model", "hidden": "d_hidden", "vocabulary": "vocab_size"}


def fit_problems(config: ParallelConfig, model: ModelConfig, seq_len: int) -> list[str]:
    """Every degree that heads, hidden widths, vocabulary, layers or row length do not allow, with what they would.

    Both configurations must be valid by themselves.
    """
    return [
        *_tp_problems(config, model),
        *_ep_problems(config, model),
        *_pp_problems(config, model),
        *_cp_problems(config, seq_len),
    ]


def _tp_problems(config: ParallelConfig, model: ModelConfig) -> list[str]:
    tp = config.tp
    if tp == 1:
        return []
    found = []
    for kind in dict.fromkeys(model.kinds):
        with torch.device("meta"):
            layer = getattr(model, kind).build(model.d_model, model.norm_eps, 0)
        shards = [rule.shard for rule in layer.parameter_rules.values()]
        shared = [] if kind != "moe" or layer.shared is None else layer.shared.parameter_rules.values()
        found += [_misfit(f"model.{kind}", tp, s) for s in shards if not (s.experts and config.ep_over_tp)]
        found += [_misfit(f"model.{kind}", tp, rule.shard, "d_shared") for rule in shared]
    found.append(_misfit("model", tp, ShardRule(0, "vocabulary", model.vocab_size)))
    return [line for line in dict.fromkeys(found) if line]


def _misfit(where: str, tp: int, shard: ShardRule, name: str | None = None) -> str:
    if shard.unit not in SHARED_OUT or shard.count % tp == 0:
        return ""
    name = name or SHARED_OUT[shard.unit]
    nearest = -(-shard.count // tp) * tp
    return (
        f"parallel.tp={tp} does not divide {where}.{name}={shard.count}; "
        f"use tp in {{{_short(divisors(shard.count))}}}, or {name}={nearest}"
    )


def _ep_problems(config: ParallelConfig, model: ModelConfig) -> list[str]:
    if config.ep == 1:
        return []
    if "moe" not in model.kinds:
        return [f"parallel.ep={config.ep} shares out experts, but model.pattern has no moe layers; set ep=1"]
    experts = model.moe.num_experts
    if experts % config.ep == 0:
        return []
    return [f"parallel.ep={config.ep} does not divide model.moe.num_experts={experts}; use one of {divisors(experts)}"]


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
