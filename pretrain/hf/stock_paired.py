"""Stock classes whose layers pair a mixer with SwiGLU or experts: GraniteMoeHybridForCausalLM and BambaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...model.config import ModelConfig
from ...model.ffns.mlp import MLPConfig
from ...model.ffns.moe import MoEConfig
from ...model.mixers.attention import AttentionConfig
from ...model.mixers.mamba2 import Mamba2Config
from . import stock_experts as experts
from . import stock_rules as rules
from .mapping import BAMBA_NAMES, GRANITE_NAMES


class _Paired:
    """What the two classes share: they differ in rotary positions, in the scale of attention and in biases."""

    kinds: tuple[str, ...] = ("mamba2", "attention", "mlp")

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        problems = rules.kind_problems(config, self.kinds)
        problems = problems or rules.pair_problems(config, self.kinds[2:])
        if "mlp" in config.kinds and config.mlp.activation != "swiglu":
            problems.append(f'model.mlp.activation="{config.mlp.activation}" (use "swiglu")')
        return problems + rules.mamba2_problems(config) + rules.expand_problems(config)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        mamba, attention = config.mamba2, config.attention
        has_attention = "attention" in config.kinds
        # The classes check these sizes of theirs even in a model without such layers.
        heads, head_dim = mamba.heads(config.d_model), mamba.head_dim
        if "mamba2" not in config.kinds:
            heads, head_dim = 1, config.d_model
        return {
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.kinds) // 2,
            "mamba_n_heads": heads,
            "mamba_d_head": head_dim,
            "mamba_expand": heads * head_dim // config.d_model,
            "mamba_d_state": mamba.d_state,
            "mamba_n_groups": mamba.num_groups if "mamba2" in config.kinds else 1,
            "mamba_d_conv": mamba.d_conv,
            "mamba_chunk_size": mamba.chunk_size,
            "mamba_conv_bias": mamba.conv_bias,
            "mamba_proj_bias": mamba.bias,
            **rules.time_step_limit(config),
            "num_attention_heads": attention.num_heads if has_attention else 1,
            "num_key_value_heads": attention.kv_heads if has_attention else 1,
            "head_dim": attention.width(config.d_model) if has_attention else config.d_model,
            "attention_bias": attention.bias,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            # Without attention the classes cannot build their cache.
            "use_cache": has_attention and not rules.has_step_limits(config),
        }

    def _model_config(
        self,
        fields: Mapping[str, Any],
        mixers: list[str],
        attention: AttentionConfig,
        ffn: MLPConfig | MoEConfig,
        norm_eps: float,
    ) -> ModelConfig:
        kind = "mlp" if isinstance(ffn, MLPConfig) else "moe"
        width, heads = fields["hidden_size"], fields.get("mamba_n_heads", 128)
        head_dim = fields.get("mamba_d_head", "auto")
        return ModelConfig(
            vocab_size=fields["vocab_size"],
            d_model=width,
            pattern=" ".join(f"{mixer} {kind}" for mixer in mixers),
            tie_embeddings=fields.get("tie_word_embeddings", False),
            norm_eps=fields.get("rms_norm_eps", norm_eps),
            mamba2=Mamba2Config(
                num_heads=heads,
                head_dim=fields.get("mamba_expand", 2) * width // heads if head_dim == "auto" else head_dim,
                d_state=fields.get("mamba_d_state", 256),
                num_groups=fields.get("mamba_n_groups", 1),
                d_conv=fields.get("mamba_d_conv", 4),
                chunk_size=fields.get("mamba_chunk_size", 256),
                conv_bias=fields.get("mamba_conv_bias", True),
                bias=fields.get("mamba_proj_bias", False),
                dt_limit=rules.dt_limit(*(fields.get("time_step_limit") or (0.0, float("inf")))),
            ),
            attention=attention,
            mlp=ffn if isinstance(ffn, MLPConfig) else MLPConfig(),
            moe=ffn if isinstance(ffn, MoEConfig) else MoEConfig(),
        )


class GraniteMoeHybrid(_Paired):
    """`GraniteMoeHybridForCausalLM`: (mixer, SwiGLU or experts) pairs, rotary positions on all channels or none."""

    kinds = ("mamba2", "attention", "mlp", "moe")
    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    names = GRANITE_NAMES

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        problems = super().problems(config)
        if "attention" in config.kinds and config.attention.rope_fraction not in (0, 1):
            problems.append(f"model.attention.rope_fraction={config.attention.rope_fraction} (use 0 or 1)")
        if "mlp" in config.kinds and config.mlp.bias:
            problems.append("model.mlp.bias=true (use false)")
        if {"mlp", "moe"} <= set(config.kinds):
            problems.append("mlp layers beside moe layers (make all of them one or the other)")
        if "moe" in config.kinds:
            problems += experts.softmax_problems(config, renormalize=True)
        return problems

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        attention = config.attention
        scale = attention.softmax_scale
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta}}
        return {
            **super().fields(config),
            "layer_types": ["mamba" if kind == "mamba2" else kind for kind in config.kinds[::2]],
            **_granite_ffn(config),
            "attention_multiplier": attention.width(config.d_model) ** -0.5 if scale is None else scale,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            **({"position_embedding_type": "rope", **rope} if attention.rope_fraction else {}),
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        once = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
        fields = {"num_local_experts": 8, "vocab_size": 32000, "hidden_size": 4096, **fields}
        rules.expect(fields, {"hidden_act": "silu", **once})
        layers = fields.get("layer_types") or fields.get("layers_block_type")
        layers = layers or ["mamba"] * fields.get("num_hidden_layers", 32)
        heads = fields.get("num_attention_heads", 32)
        attention = AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rope_fraction=1.0 if fields.get("position_embedding_type") == "rope" else 0.0,
            rope_theta=_rope(fields)[0],
            bias=fields.get("attention_bias", False),
            softmax_scale=fields.get("attention_multiplier", 1.0),
        )
        shared = fields.get("shared_intermediate_size", 1024)
        ffn: MLPConfig | MoEConfig = MLPConfig(d_hidden=shared, activation="swiglu")
        if fields["num_local_experts"]:
            ffn = MoEConfig(
                num_experts=fields["num_local_experts"],
                top_k=fields.get("num_experts_per_tok", 2),
                d_hidden=fields.get("intermediate_size", 11008),
                d_shared=shared,
                renormalize=True,
            )
        mixers = ["mamba2" if layer in ("mamba", "linear_attention") else "attention" for layer in layers]
        return self._model_config(fields, mixers, attention, ffn, 1e-6)


def _granite_ffn(config: ModelConfig) -> dict[str, int]:
    """A dense model is one without experts, whose shared expert is the layer."""
    if "moe" not in config.kinds:
        hidden = config.mlp.hidden(config.d_model)
        sizes = {"num_local_experts": 0, "num_experts_per_tok": 0}
        return {**sizes, "shared_intermediate_size": hidden, "intermediate_size": hidden}
    return {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "shared_intermediate_size": config.moe.d_shared,
        "intermediate_size": config.moe.hidden(config.d_model),
    }


class Bamba(_Paired):
    """`BambaForCausalLM`: (mixer, SwiGLU) pairs, attention with rotary positions on some or all channels."""

    model_type = "bamba"
    architecture = "BambaForCausalLM"
    names = BAMBA_NAMES

    def problems(self, config: ModelConfig) -> list[str]:
        """See StockClass.problems."""
        problems = super().problems(config) + rules.attention_scale_problems(config)
        if "attention" in config.kinds and not config.attention.rope_fraction:
            problems.append("model.attention.rope_fraction=0 (use 0.5 or 1)")
        return problems

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """See StockClass.fields."""
        attention = config.attention
        return {
            **super().fields(config),
            "attn_layer_indices": [i for i, kind in enumerate(config.kinds[::2]) if kind == "attention"],
            "intermediate_size": config.mlp.hidden(config.d_model),
            "mlp_bias": config.mlp.bias,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": attention.rope_theta,
                "partial_rotary_factor": attention.rope_fraction or 1.0,
            },
        }

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """See StockClass.model_config."""
        fields = {"vocab_size": 128000, "hidden_size": 4096, **fields}
        rules.expect(fields, {"hidden_act": "silu"})
        heads = fields.get("num_attention_heads", 32)
        theta, fraction = _rope(fields)
        attention = AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", 8) or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rope_fraction=0.5 if fraction is None else fraction,
            rope_theta=theta,
            bias=fields.get("attention_bias", False),
        )
        mlp = MLPConfig(
            d_hidden=fields.get("intermediate_size", 14336), activation="swiglu", bias=fields.get("mlp_bias", False)
        )
        attends = set(fields.get("attn_layer_indices") or ())
        layers = range(fields.get("num_hidden_layers", 32))
        mixers = ["attention" if layer in attends else "mamba2" for layer in layers]
        return self._model_config(fields, mixers, attention, mlp, 1e-5)


def _rope(fields: Mapping[str, Any]) -> tuple[float, float | None]:
    """Base of the rotary frequencies, and the share of channels rotated where it is said."""
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    rules.expect({"rope_type": "default", **scaling, **rope}, {"rope_type": "default"})
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    return float(theta), rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
