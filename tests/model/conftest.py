"""Small models that between them use every layer kind and every option."""

import pytest
import torch

from headrace.model import HybridLM, ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.mixers.attention import AttentionConfig, SlidingAttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config

SMALL = Mamba2Config(head_dim=8, d_state=6, chunk_size=16)


def _lm(pattern: str, **options: object) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 37, "d_model": 24, "mamba2": SMALL, "pattern": pattern, **options})


MODELS: dict[str, ModelConfig] = {
    "mamba2": _lm("2*mamba2"),
    "mamba2-grouped": _lm(
        "mamba2",
        mamba2=Mamba2Config(
            num_heads=6, head_dim=5, d_state=7, num_groups=3, d_conv=3, chunk_size=8, bias=True, skip="channel"
        ),
    ),
    "mamba2-norm-first": _lm(
        "mamba2",
        mamba2=Mamba2Config(
            head_dim=8, d_state=4, num_groups=2, gated_norm="whole", norm_before_gate=True, dt_limit=(0.01, 0.05)
        ),
    ),
    "mamba2-bare": _lm(
        "mamba2",
        mamba2=Mamba2Config(head_dim=8, d_state=4, d_conv=1, conv_bias=False, skip="none", gated_norm="none"),
    ),
    "mamba1": _lm("2*mamba1", mamba1=Mamba1Config(d_state=5)),
    "mamba1-norms": _lm(
        "mamba1", mamba1=Mamba1Config(expand=1.5, d_state=4, d_conv=2, dt_rank=3, inner_norms=True, bias=True)
    ),
    "mamba1-bare": _lm("mamba1", mamba1=Mamba1Config(expand=1, d_state=1, d_conv=1, dt_rank=1, conv_bias=False)),
    "attention": _lm("2*attention", attention=AttentionConfig(num_heads=4, num_kv_heads=2, bias=True)),
    "attention-rope": _lm(
        "attention",
        attention=AttentionConfig(num_heads=3, head_dim=8, rope_fraction=0.5, rope_theta=100.0, softmax_scale=0.2),
    ),
    "sliding_attention": _lm(
        "2*sliding_attention",
        sliding_attention=SlidingAttentionConfig(num_heads=4, head_dim=6, num_kv_heads=1, rope_fraction=1.0, window=5),
    ),
    "mlp": _lm("mlp", mlp=MLPConfig(d_hidden=20, bias=True)),
    "mlp-relu2": _lm("mlp", mlp=MLPConfig(activation="relu2")),
    "mlp-gelu": _lm("mlp", mlp=MLPConfig(activation="gelu", bias=True), tie_embeddings=False),
    "moe": _lm("mamba2 moe", moe=MoEConfig(num_experts=5, top_k=2, d_hidden=12)),
    "moe-switch": _lm("moe", moe=MoEConfig(num_experts=3, top_k=1, d_hidden=10, activation="gelu", jitter=0.1)),
    "moe-groups": _lm(
        "moe",
        moe=MoEConfig(
            num_experts=8,
            top_k=3,
            d_hidden=6,
            activation="relu2",
            d_shared=9,
            score="sigmoid",
            renormalize=True,
            scale=2.5,
            num_groups=4,
            top_groups=2,
            balance="bias",
        ),
    ),
    "moe-chunks": _lm("mamba2 moe", moe=MoEConfig(num_experts=4, top_k=2, d_hidden=8, chunk=4, balance="sinkhorn")),
    "hybrid": _lm(
        "2*(mamba2 mlp) attention sliding_attention mlp",
        attention=AttentionConfig(num_heads=4, rope_fraction=1.0),
        sliding_attention=SlidingAttentionConfig(num_heads=4, window=9),
        tie_embeddings=False,
    ),
}


def build_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> HybridLM:
    """An initialised model whose constant parameters are stirred, so that none of them hides a mistake."""
    model = HybridLM(config)
    model.initialize(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, kind in model.parameter_kinds().items():
            parameter = model.get_parameter(name)
            if kind in ("norm", "bias", "embedding") or name.endswith(".D"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


@pytest.fixture(params=MODELS, ids=str)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture
def model(config: ModelConfig) -> HybridLM:
    return build_model(config)


@pytest.fixture
def small_models() -> dict[str, ModelConfig]:
    return MODELS


@pytest.fixture
def build():
    return build_model
