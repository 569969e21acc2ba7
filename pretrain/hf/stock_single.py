"""Stock classes whose layers are ours one by one: Mamba2ForCausalLM and NemotronHForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...model.config import ModelConfig
from ...model.ffns.mlp import MLPConfig
from ...model.ffns.moe import MoEConfig
from ...model.mixers.attention import AttentionConfig
from ...model.mixers.mamba2 import Mamba2Config
from ...model.pattern import MEGATRON_LETTERS
from . import stock_experts as experts
from . import stock_rules as rules
from .mapping import MAMBA2_NAMES, NEMOTRON_H_NAMES


class Mamba2:
    """`Mamba2ForCausalLM`: Mamba-2 layers only."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    names = MAMBA2_NAMES
    kinds = ("mamba2",)

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        return rules.kind_problems(config, self.kinds) + rules.mamba2_problems(config) + rules.expand_problems(config)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        mamba = config.mamba2
        heads = mamba.heads(config.d_model)
        return {
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.kinds),
            "num_heads": heads,
            "head_dim": mamba.head_dim,
            "expand": heads * mamba.head_dim // config.d_model,
            "state_size": mamba.d_state,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.d_conv,
            "chunk_size": mamba.chunk_size,
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": config.residual_in_fp32,
            **rules.time_step_limit(config),
            "use_cache": not rules.has_step_limits(config),
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        rules.expect(fields, {"hidden_act": "silu"})
        limits = fields.get("time_step_limit", (0.0, float("inf")))
        return ModelConfig(
            vocab_size=fields.get("vocab_size", 32768),
            d_model=fields.get("hidden_size", 4096),
            pattern=f"{fields.get('num_hidden_layers', 64)}*mamba2",
            tie_embeddings=fields.get("tie_word_embeddings", False),
            norm_eps=fields.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=fields.get("residual_in_fp32", True),
            mamba2=Mamba2Config(
                num_heads=fields.get("num_heads", 128),
                head_dim=fields.get("head_dim", 64),
                d_state=fields.get("state_size", 128),
                num_groups=fields.get("n_groups", 8),
                d_conv=fields.get("conv_kernel", 4),
                chunk_size=fields.get("chunk_size", 256),
                conv_bias=fields.get("use_conv_bias", True),
                bias=fields.get("use_bias", False),
                dt_limit=rules.dt_limit(*limits),
            ),
        )


_LETTERS = {kind: letter for letter, kind in MEGATRON_LETTERS.items()}
_KINDS = {  # Hugging Face has renamed its layer types; all spellings are out there.
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}


class NemotronH:
    """`NemotronHForCausalLM`: Mamba-2, attention without positions, non-gated MLPs and experts, in any order."""

    model_type = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    names = NEMOTRON_H_NAMES
    kinds = tuple(_LETTERS)

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        problems = rules.kind_problems(config, self.kinds) + rules.mamba2_problems(config)
        problems += rules.attention_scale_problems(config)
        if rules.has_step_limits(config) and config.mamba2.dt_limit[1] < rules.NO_UPPER_LIMIT:
            problems.append(f"model.mamba2.dt_limit={list(config.mamba2.dt_limit)} (only a lower limit)")
        if "attention" in config.kinds and config.attention.rope_fraction:
            problems.append(f"model.attention.rope_fraction={config.attention.rope_fraction} (use 0)")
        if "attention" in config.kinds and config.attention.bias:
            problems.append("model.attention.bias=true (use false)")
        if "mlp" in config.kinds and config.mlp.activation == "swiglu":
            problems.append('model.mlp.activation="swiglu" (use "relu2" or "gelu", or follow every mixer with an mlp)')
        return problems + experts.nemotron_problems(config)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        mamba, attention = config.mamba2, config.attention
        has_attention = "attention" in config.kinds
        return {
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.kinds),
            "hybrid_override_pattern": "".join(_LETTERS[kind] for kind in config.kinds),
            "mamba_num_heads": mamba.heads(config.d_model),
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.d_state,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.d_conv,
            "chunk_size": mamba.chunk_size,
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "mamba_hidden_act": "silu",
            # The class clamps step sizes to this, which is meant for initialisation, and ignores time_step_limit.
            "time_step_min": max(mamba.dt_limit[0], 1 / rules.NO_UPPER_LIMIT),
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.width(config.d_model),
            "intermediate_size": config.mlp.hidden(config.d_model),
            "mlp_hidden_act": config.mlp.activation if config.mlp.activation != "swiglu" else "relu2",
            "mlp_bias": config.mlp.bias,
            **experts.nemotron_fields(config),
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": config.residual_in_fp32,
            # Without attention the class cannot build its cache.
            "use_cache": has_attention and not rules.has_step_limits(config),
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        rules.expect(fields, {"mamba_hidden_act": "silu", "sliding_window": None, "num_nextn_predict_layers": 0})
        heads = fields.get("num_attention_heads", 32)
        kinds = _nemotron_kinds(fields)
        return ModelConfig(
            vocab_size=fields.get("vocab_size", 131072),
            d_model=fields.get("hidden_size", 4096),
            pattern=rules.counted(kinds),
            tie_embeddings=fields.get("tie_word_embeddings", False),
            norm_eps=fields.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=fields.get("residual_in_fp32", False),
            mamba2=Mamba2Config(
                num_heads=fields.get("mamba_num_heads", 128),
                head_dim=fields.get("mamba_head_dim", 64),
                d_state=fields.get("ssm_state_size", 128),
                num_groups=fields.get("n_groups", 8),
                d_conv=fields.get("conv_kernel", 4),
                chunk_size=fields.get("chunk_size", 128),
                conv_bias=fields.get("use_conv_bias", True),
                bias=fields.get("use_bias", False),
                dt_limit=rules.dt_limit(fields.get("time_step_min", 0.001), float("inf")),
            ),
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=fields.get("num_key_value_heads", 8) or heads,
                head_dim=fields.get("head_dim", 128),
            ),
            mlp=MLPConfig(
                d_hidden=fields.get("intermediate_size", 21504),
                activation=fields.get("mlp_hidden_act", "relu2"),
                bias=fields.get("mlp_bias", False),
            ),
            moe=experts.nemotron_config(fields) if "moe" in kinds else MoEConfig(),
        )


def _nemotron_kinds(fields: Mapping[str, Any]) -> list[str]:
    listed = fields.get("layers_block_type") or fields.get("layer_types")
    named = {**_KINDS, **MEGATRON_LETTERS}
    layers = listed if listed else list(fields.get("hybrid_override_pattern", ""))
    unknown = sorted({layer for layer in layers if layer not in named})
    if unknown or not layers:
        raise UserError(
            f"this nemotron_h model has layers that cannot be read: {', '.join(unknown) or 'none are listed'}"
        )
    return [named[layer] for layer in layers]
