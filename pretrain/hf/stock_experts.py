"""What the mixture-of-experts layers of stock classes can express: routers that score as ours do in evaluation.

What only training knows (balance losses, Sinkhorn normalisation, z-loss, jitter) needs no place in a stock class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...model.config import ModelConfig
from ...model.ffns.moe import MoEConfig
from . import stock_rules as rules


def softmax_problems(config: ModelConfig, *, renormalize: bool) -> list[str]:
    """Options of experts that Granite (`renormalize`: a softmax over the chosen alone) and Jamba do not have."""
    moe = config.moe
    problems = _chunk_problems(moe)
    if moe.score != "softmax":
        problems.append(f'model.moe.score="{moe.score}" (use "softmax")')
    if moe.renormalize != renormalize:
        problems.append(f"model.moe.renormalize={_toml(moe.renormalize)} (use {_toml(renormalize)})")
    if moe.scale != 1:
        problems.append(f"model.moe.scale={moe.scale} (use 1)")
    if moe.num_groups != 1:
        problems.append(f"model.moe.num_groups={moe.num_groups} (use 1)")
    if moe.balance == "bias":
        problems.append('model.moe.balance="bias" (use "loss")')
    if moe.activation != "swiglu":
        problems.append(f'model.moe.activation="{moe.activation}" (use "swiglu")')
    return problems


def nemotron_problems(config: ModelConfig) -> list[str]:
    """Options of experts that NemotronH does not have; nothing when the model has no such layer."""
    if "moe" not in config.kinds:
        return []
    moe, mlp = config.moe, config.mlp
    problems = _chunk_problems(moe)
    if moe.score != "sigmoid":
        problems.append(f'model.moe.score="{moe.score}" (use "sigmoid")')
    if moe.activation == "swiglu":
        problems.append('model.moe.activation="swiglu" (use "relu2" or "gelu")')
    # It takes the two best of a group, so a group must have two.
    if moe.num_experts // moe.num_groups < 2:
        problems.append(f"model.moe.num_groups={moe.num_groups} of num_experts={moe.num_experts} (use fewer groups)")
    if "mlp" in config.kinds and mlp.activation not in (moe.activation, "swiglu"):
        problems.append(f'model.mlp.activation="{mlp.activation}" (use that of model.moe)')
    if "mlp" in config.kinds and mlp.bias:
        problems.append("model.mlp.bias=true beside moe layers (use false)")
    return problems


def nemotron_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of NemotronH's experts; none when the model has no such layer."""
    if "moe" not in config.kinds:
        return {}
    moe = config.moe
    return {
        "mlp_hidden_act": moe.activation,
        "mlp_bias": False,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden(config.d_model),
        # The class does not read the number and always has one, of width 1 and zero where we have none.
        "n_shared_experts": 1 if moe.d_shared else 0,
        "moe_shared_expert_intermediate_size": moe.d_shared or 1,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": float(moe.scale),
    }


def nemotron_config(fields: Mapping[str, Any]) -> MoEConfig:
    """Our options of NemotronH's experts; its correction bias is always there."""
    rules.expect(fields, {"moe_latent_size": None})
    shared = fields.get("n_shared_experts", 1)
    return MoEConfig(
        num_experts=fields.get("n_routed_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        d_hidden=fields.get("moe_intermediate_size", 7688),
        activation=fields.get("mlp_hidden_act", "relu2"),
        d_shared=fields.get("moe_shared_expert_intermediate_size", 7688) if shared else 0,
        score="sigmoid",
        renormalize=fields.get("norm_topk_prob", True),
        scale=float(fields.get("routed_scaling_factor", 1.0)),
        num_groups=fields.get("n_group", 1),
        top_groups=fields.get("topk_group", 1),
        balance="bias",
    )


def _chunk_problems(moe: MoEConfig) -> list[str]:
    return [f"model.moe.chunk={moe.chunk} (use 1)"] if moe.chunk != 1 else []


def _toml(value: bool) -> str:
    return "true" if value else "false"
