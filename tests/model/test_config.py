"""Configurations: all problems at once, and counts that hold for whatever options are drawn."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from headrace.errors import UserError
from headrace.model import HybridLM, ModelConfig, SequenceContext
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.mixers.attention import AttentionConfig, SlidingAttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config

SMALL = st.integers(0, 12)
TABLES = {
    "mamba2": st.builds(
        Mamba2Config,
        num_heads=st.none() | SMALL,
        head_dim=SMALL,
        expand=st.sampled_from([0.0, 0.5, 1, 1.3, 2, math.inf]),
        d_state=SMALL,
        num_groups=SMALL,
        d_conv=st.integers(0, 5),
        conv_bias=st.booleans(),
        bias=st.booleans(),
        skip=st.sampled_from(["head", "channel", "none", "row"]),
        gated_norm=st.sampled_from(["group", "whole", "none"]),
    ),
    "mamba1": st.builds(
        Mamba1Config,
        expand=st.sampled_from([0.0, 0.01, 0.5, 1, 1.3, 2, math.inf, math.nan]),
        d_state=SMALL,
        d_conv=st.integers(0, 5),
        dt_rank=st.none() | SMALL,
        conv_bias=st.booleans(),
        bias=st.booleans(),
        inner_norms=st.booleans(),
    ),
    "attention": st.builds(
        AttentionConfig,
        num_heads=SMALL,
        num_kv_heads=st.none() | SMALL,
        head_dim=st.none() | SMALL,
        rope_fraction=st.sampled_from([0, 0.1, 0.5, 1, 2]),
        bias=st.booleans(),
    ),
    "sliding_attention": st.builds(SlidingAttentionConfig, num_heads=st.integers(1, 4), window=SMALL),
    "mlp": st.builds(
        MLPConfig,
        d_hidden=st.none() | SMALL,
        activation=st.sampled_from(["swiglu", "relu2", "gelu", "elu"]),
        bias=st.booleans(),
    ),
}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(TABLES)), st.integers(0, 40), st.booleans(), st.data())
def test_problems_or_a_model_of_the_counted_size(kind: str, d_model: int, tie: bool, data: st.DataObject) -> None:
    table = data.draw(TABLES[kind])
    config = ModelConfig(vocab_size=11, d_model=d_model, pattern=f"2*{kind}", tie_embeddings=tie, **{kind: table})
    problems = config.problems()
    if problems:
        assert all("; " in line for line in problems)
        with pytest.raises(UserError) as error:
            HybridLM(config)
        assert all(line in str(error.value) for line in problems)
        return
    with torch.device("meta"):
        model = HybridLM(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())
    assert {name for name, _ in model.initial_values(0)} == set(model.state_dict())
    logits = model(torch.zeros(1, 3, dtype=torch.long, device="meta"))
    assert logits.shape == (1, 3, 11)
    assert config.flops_per_token(8) > 0


def test_all_problems_are_listed_with_remedies() -> None:
    config = ModelConfig(
        vocab_size=0,
        d_model=64,
        pattern="mamba2 attention mlp",
        mamba2=Mamba2Config(num_heads=8, num_groups=3),
        attention=AttentionConfig(num_heads=8, num_kv_heads=5),
        mlp=MLPConfig(activation="relu"),  # type: ignore[arg-type]
    )
    assert config.problems() == [
        "vocab_size=0 must be at least 1; use a positive whole number",
        "mamba2.num_groups=3 does not divide num_heads=8; use one of 1, 2, 4, 8",
        "attention.num_kv_heads=5 does not divide num_heads=8; use one of 1, 2, 4, 8",
        "mlp.activation='relu' is unknown; use one of swiglu, relu2, gelu",
    ]


def test_unused_tables_are_not_checked() -> None:
    assert ModelConfig(vocab_size=8, d_model=7, pattern="mlp", attention=AttentionConfig(num_heads=3)).problems() == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (Mamba2Config(head_dim=48), "head_dim=48 does not divide expand*d_model=128; use one of 1, 2, 4, 8"),
        (Mamba2Config(dt_min=0.2), "dt_min=0.2 must be above 0 and at most dt_max=0.1"),
        (Mamba2Config(dt_limit=(0.5, 0.1)), "dt_limit=(0.5, 0.1) must rise from 0"),
        (Mamba2Config(A_range=(0.0, 1.0)), "A_range=(0.0, 1.0) must rise from above 0 and be finite"),
        (Mamba2Config(A_range=(1.0, math.inf)), "A_range"),
        (Mamba2Config(dt_floor=0.0), "dt_floor=0.0 must be above 0"),
        (Mamba2Config(gated_norm="rows"), "gated_norm='rows' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_mamba2_mistakes(table: Mamba2Config, words: str) -> None:
    (problem,) = ModelConfig(vocab_size=8, d_model=64, pattern="mamba2", mamba2=table).problems()
    assert words in problem


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (Mamba1Config(expand=1.01), "expand=1.01 times d_model=64 must be a positive whole number of channels; use 2"),
        (Mamba1Config(expand=math.inf), "expand=inf must be finite"),
        (Mamba1Config(dt_rank=0), "dt_rank=0 must be at least 1"),
        (Mamba1Config(dt_min=0.2), "dt_min=0.2 must be above 0 and at most dt_max=0.1"),
        (Mamba1Config(dt_floor=0.0), "dt_floor=0.0 must be above 0"),
    ],
)
def test_mamba1_mistakes(table: Mamba1Config, words: str) -> None:
    (problem,) = ModelConfig(vocab_size=8, d_model=64, pattern="mamba1", mamba1=table).problems()
    assert words in problem


def test_every_field_changes_the_model_or_its_first_values() -> None:
    """Options that nothing reads would leave parameters, first values and outputs as they are."""
    changes: dict[str, dict[str, Any]] = {
        "mamba2": {
            "num_heads": 2, "head_dim": 16, "expand": 1, "d_state": 8, "num_groups": 2, "d_conv": 2, "chunk_size": 4,
            "conv_bias": False, "bias": True, "skip": "channel", "gated_norm": "none", "norm_before_gate": True,
            "dt_limit": (0.01, 0.02), "dt_min": 0.01, "dt_max": 0.5, "dt_floor": 0.05, "A_range": (2.0, 3.0),
        },
        "mamba1": {
            "expand": 1, "d_state": 8, "d_conv": 2, "dt_rank": 3, "conv_bias": False, "bias": True,
            "inner_norms": True, "dt_min": 0.01, "dt_max": 0.5, "dt_floor": 0.05,
        },
        "attention": {
            "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rope_fraction": 0.5, "rope_theta": 10.0, "bias": True,
            "softmax_scale": 3.0,
        },
        "sliding_attention": {"window": 2},
        "mlp": {"d_hidden": 10, "activation": "gelu", "bias": True},
    }  # fmt: skip
    base = ModelConfig(
        vocab_size=11,
        d_model=16,
        pattern="mamba2 mamba1 attention sliding_attention mlp",
        mamba2=Mamba2Config(head_dim=8, d_state=4),
        attention=AttentionConfig(num_heads=4, rope_fraction=1.0),
        sliding_attention=SlidingAttentionConfig(num_heads=4),
    )
    for kind, fields in changes.items():
        table = getattr(base, kind)
        own = {field.name for field in dataclasses.fields(table)}
        assert own == set(fields) or kind == "sliding_attention"
        for name, value in fields.items():
            changed = dataclasses.replace(base, **{kind: dataclasses.replace(table, **{name: value})})
            assert changed.problems() == []
            assert _fingerprint(changed) != _fingerprint(base) or name == "chunk_size", f"{kind}.{name}"


def _fingerprint(config: ModelConfig) -> list[float]:
    model = HybridLM(config)
    model.initialize(0)
    with torch.no_grad():
        model(torch.arange(9)[None])
        return [*model(torch.arange(9)[None]).flatten().tolist(), float(config.num_params())]


@pytest.mark.parametrize("pattern", ["mlp", "2*mlp attention", "sliding_attention"])
def test_flops_equal_counted_matrix_products(pattern: str) -> None:
    L = 16
    config = ModelConfig(
        vocab_size=11,
        d_model=24,
        pattern=pattern,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        sliding_attention=SlidingAttentionConfig(num_heads=4, window=4),
    )
    with torch.device("meta"):
        model = HybridLM(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, L, dtype=torch.long))
    # The counter takes the whole L x L square of attention; we count what a token sees.
    seen = {"attention": (L + 1) / 2, "sliding_attention": (1 + 2 + 3 + 4 * 13) / L}
    unseen = sum(4 * 24 * (L - seen[kind]) * L for kind in config.kinds if kind in seen)
    assert 3 * (counter.get_total_flops() - unseen) == pytest.approx(config.flops_per_token(L) * L, rel=1e-3)


def test_flops_of_mamba2_grow_with_the_chunk_only() -> None:
    table = Mamba2Config(head_dim=8, d_state=16, num_groups=2, chunk_size=32)
    short, long = (table.flops_per_token(64, L) for L in (32, 4096))
    assert short == long
    projections = table.num_params(64) - (128 + 64) * 5 - 3 * 16 - 128
    ssd = 32 * (2 * 16 + 128) // 2 + 2 * 128 * 16
    assert long == 6 * (projections + ssd)


@pytest.mark.parametrize("table", [Mamba1Config(), Mamba1Config(expand=1, d_state=5, dt_rank=7)])
def test_flops_of_mamba1_are_its_products_and_two_for_each_state(table: Mamba1Config) -> None:
    L = 16
    with torch.device("meta"):
        layer = table.build(48, 1e-5, 0)
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, L, 48), SequenceContext())
    states = 2 * 2 * table.inner(48) * table.d_state
    assert 3 * (counter.get_total_flops() / L + states) == table.flops_per_token(48, L)
