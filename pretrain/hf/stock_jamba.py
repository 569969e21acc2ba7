"""`JambaForCausalLM`: pairs of Mamba-1 with inner norms, or attention, and a feed-forward: SwiGLU or experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ...model.config import ModelConfig
from ...model.ffns.mlp import MLPConfig
from ...model.ffns.moe import MoEConfig
from ...model.mixers.attention import AttentionConfig
from ...model.mixers.mamba1 import Mamba1Config
from . import stock_experts as experts
from . import stock_rules as rules
from .mapping import JAMBA_NAMES


class Jamba:
    """`JambaForCausalLM`. Which layers have attention, and which have experts, must recur with a period."""

    model_type = "jamba"
    architecture = "JambaForCausalLM"
    names = JAMBA_NAMES
    kinds = ("mamba1", "attention", "mlp", "moe")

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        kinds = config.kinds
        problems = rules.kind_problems(config, self.kinds)
        problems = problems or rules.pair_problems(config, self.kinds[2:]) or _period_problems(config)
        if "mamba1" in kinds and not config.mamba1.inner_norms:
            problems.append("model.mamba1.inner_norms=false (use true)")
        if "mamba1" in kinds and config.mamba1.expand % 1:
            problems.append(f"model.mamba1.expand={config.mamba1.expand} (use a whole number)")
        if "attention" in kinds:
            problems += _attention_problems(config)
        if "mlp" in kinds:
            problems += _mlp_problems(config)
        if "moe" in kinds:
            problems += _expert_problems(config)
        return problems

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        mamba, attention, moe = config.mamba1, config.attention, config.moe
        mixers, ffns = config.kinds[::2], config.kinds[1::2]
        has_attention, has_experts = "attention" in mixers, "moe" in ffns
        ffn: MLPConfig | MoEConfig = moe if has_experts else config.mlp
        attention_places = _period([kind == "attention" for kind in mixers])
        expert_places = _period([kind == "moe" for kind in ffns])
        assert attention_places is not None
        assert expert_places is not None
        return {
            "hidden_size": config.d_model,
            "num_hidden_layers": len(mixers),
            "intermediate_size": ffn.hidden(config.d_model),
            "attn_layer_period": attention_places[0],
            "attn_layer_offset": attention_places[1],
            "expert_layer_period": expert_places[0],
            "expert_layer_offset": expert_places[1],
            "num_experts": moe.num_experts if has_experts else 1,
            "num_experts_per_tok": moe.top_k if has_experts else 1,
            "num_attention_heads": attention.num_heads if has_attention else 1,
            "num_key_value_heads": attention.kv_heads if has_attention else 1,
            "mamba_d_state": mamba.d_state,
            "mamba_d_conv": mamba.d_conv,
            "mamba_expand": int(mamba.expand),
            "mamba_dt_rank": mamba.rank(config.d_model),
            "mamba_conv_bias": mamba.conv_bias,
            "mamba_proj_bias": mamba.bias,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            # Without attention the class cannot build its cache.
            "use_cache": has_attention,
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        rules.expect(fields, {"hidden_act": "silu"})
        width, hidden = fields.get("hidden_size", 4096), fields.get("intermediate_size", 14336)
        heads, num_experts = fields.get("num_attention_heads", 32), fields.get("num_experts", 16)
        layers = range(fields.get("num_hidden_layers", 32))
        attends = _places(fields, "attn", (8, 4), layers)
        chooses = _places(fields, "expert", (2, 1), layers) if num_experts > 1 else set()
        kinds: list[str] = []
        for layer in layers:
            kinds += ["attention" if layer in attends else "mamba1", "moe" if layer in chooses else "mlp"]
        rank = fields.get("mamba_dt_rank", "auto")
        return ModelConfig(
            vocab_size=fields.get("vocab_size", 65536),
            d_model=width,
            pattern=" ".join(kinds),
            tie_embeddings=fields.get("tie_word_embeddings", False),
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            mamba1=Mamba1Config(
                expand=fields.get("mamba_expand", 2),
                d_state=fields.get("mamba_d_state", 16),
                d_conv=fields.get("mamba_d_conv", 4),
                dt_rank=None if rank == "auto" else rank,
                conv_bias=fields.get("mamba_conv_bias", True),
                bias=fields.get("mamba_proj_bias", False),
                inner_norms=True,
            ),
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=fields.get("num_key_value_heads", 8) or heads,
                head_dim=fields.get("head_dim") or width // heads,
            ),
            mlp=MLPConfig(d_hidden=hidden, activation="swiglu"),
            moe=MoEConfig(num_experts=num_experts, top_k=fields.get("num_experts_per_tok", 2), d_hidden=hidden),
        )


def _period_problems(config: ModelConfig) -> list[str]:
    return [
        f'{kind} layers of model.pattern="{config.pattern}" (give them a period)'
        for kind, layers in {"attention": config.kinds[::2], "moe": config.kinds[1::2]}.items()
        if _period([layer == kind for layer in layers]) is None
    ]


def _attention_problems(config: ModelConfig) -> list[str]:
    attention = config.attention
    problems = rules.attention_scale_problems(config)
    if attention.rope_fraction:
        problems.append(f"model.attention.rope_fraction={attention.rope_fraction} (use 0)")
    if attention.bias:
        problems.append("model.attention.bias=true (use false)")
    if attention.width(config.d_model) * attention.num_heads != config.d_model:
        problems.append(f"model.attention.head_dim={attention.head_dim} (leave it out)")
    return problems


def _mlp_problems(config: ModelConfig) -> list[str]:
    mlp = config.mlp
    problems = []
    if mlp.activation != "swiglu":
        problems.append(f'model.mlp.activation="{mlp.activation}" (use "swiglu")')
    if mlp.bias:
        problems.append("model.mlp.bias=true (use false)")
    hidden, of_experts = mlp.hidden(config.d_model), config.moe.hidden(config.d_model)
    if "moe" in config.kinds and hidden != of_experts:
        problems.append(f"model.mlp.d_hidden={hidden} beside model.moe.d_hidden={of_experts} (make them equal)")
    return problems


def _expert_problems(config: ModelConfig) -> list[str]:
    problems = experts.softmax_problems(config, renormalize=False)
    if config.moe.d_shared:
        problems.append(f"model.moe.d_shared={config.moe.d_shared} (use 0)")
    if config.moe.num_experts < 2:
        problems.append(f"model.moe.num_experts={config.moe.num_experts} (use 2 or more)")
    return problems


def _period(marked: Sequence[bool]) -> tuple[int, int] | None:
    """The least period and the offset at which layers are marked; None when there is none."""
    for period in range(1, len(marked) + 2):
        for offset in range(period):
            if all(mark == (layer % period == offset) for layer, mark in enumerate(marked)):
                return period, offset
    return None


def _places(fields: Mapping[str, Any], name: str, default: tuple[int, int], layers: range) -> set[int]:
    period = fields.get(f"{name}_layer_period", default[0])
    offset = fields.get(f"{name}_layer_offset", default[1])
    if period < 1:
        raise UserError(f"this jamba model has {name}_layer_period={period}; use 1 or more")
    return {layer for layer in layers if layer % period == offset}
