"""The stock class of Mamba-1 models: MambaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...model.config import ModelConfig
from ...model.mixers.mamba1 import Mamba1Config
from . import stock_rules as rules
from .mapping import MAMBA1_NAMES


class Mamba:
    """`MambaForCausalLM`: Mamba-1 layers only, as in the released state-spaces/mamba-*-hf models."""

    model_type = "mamba"
    architecture = "MambaForCausalLM"
    names = MAMBA1_NAMES
    kinds = ("mamba1",)

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        problems = rules.kind_problems(config, self.kinds)
        if "mamba1" not in config.kinds:
            return problems
        if config.mamba1.inner_norms:
            problems.append("model.mamba1.inner_norms=true (use false)")
        if not float(config.mamba1.expand).is_integer():
            problems.append(f"model.mamba1.expand={config.mamba1.expand} (use a whole number)")
        return problems

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        mamba = config.mamba1
        return {
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.kinds),
            "expand": int(mamba.expand),
            "state_size": mamba.d_state,
            "time_step_rank": mamba.rank(config.d_model),
            "conv_kernel": mamba.d_conv,
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": config.residual_in_fp32,
            "use_cache": True,
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        rules.expect(fields, {"hidden_act": "silu"})
        rank = fields.get("time_step_rank", "auto")
        return ModelConfig(
            vocab_size=fields.get("vocab_size", 50280),
            d_model=fields.get("hidden_size", 768),
            pattern=f"{fields.get('num_hidden_layers', 32)}*mamba1",
            tie_embeddings=fields.get("tie_word_embeddings", True),
            norm_eps=fields.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=fields.get("residual_in_fp32", True),
            mamba1=Mamba1Config(
                expand=fields.get("expand", 2),
                d_state=fields.get("state_size", 16),
                d_conv=fields.get("conv_kernel", 4),
                dt_rank=None if rank == "auto" else rank,
                conv_bias=fields.get("use_conv_bias", True),
                bias=fields.get("use_bias", False),
            ),
        )
