"""Sizes of the published models: ours, the stock class's of the same settings, and the published figure."""

import pytest
import torch

from headrace.model import HybridLM
from headrace.model.pattern import MEGATRON_LETTERS
from headrace.model.presets import MAMBA2_HYBRID_8B, NEMOTRON_3_NANO, PRESETS, PUBLISHED, PUBLISHED_ACTIVE


def _stock_count(name: str) -> int | None:
    transformers = pytest.importorskip("transformers")
    config = PRESETS[name]
    if name == "nemotron-3-nano-30b-a3b":
        stock = transformers.NemotronHConfig(
            vocab_size=131072,
            hidden_size=2688,
            hybrid_override_pattern=NEMOTRON_3_NANO,
            num_attention_heads=32,
            num_key_value_heads=2,
            head_dim=128,
            mamba_num_heads=64,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
            n_routed_experts=128,
            num_experts_per_tok=6,
            moe_intermediate_size=1856,
            moe_shared_expert_intermediate_size=3712,
        )
        build = transformers.NemotronHForCausalLM
    elif "moe" in config.kinds:
        return None
    elif name == "mamba2-hybrid-8b":
        stock = transformers.NemotronHConfig(
            vocab_size=256000,
            hidden_size=4096,
            hybrid_override_pattern=MAMBA2_HYBRID_8B,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=16384,
            mamba_num_heads=128,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
        )
        build = transformers.NemotronHForCausalLM
    elif "mamba1" in config.kinds:
        # The class's own defaults are those of the released models: only sizes differ.
        stock = transformers.MambaConfig(hidden_size=config.d_model, num_hidden_layers=len(config.kinds))
        build = transformers.MambaForCausalLM
    else:
        stock = transformers.Mamba2Config(
            vocab_size=50288,
            hidden_size=config.d_model,
            num_hidden_layers=len(config.kinds),
            num_heads=config.d_model // 32,
            head_dim=64,
            state_size=128,
            n_groups=1,
            tie_word_embeddings=True,
        )
        build = transformers.Mamba2ForCausalLM
    with torch.device("meta"):
        model = build(stock)
    # Where the class has a correction bias as a buffer, we have a frozen parameter.
    biases = [buffer for buffer_name, buffer in model.named_buffers() if buffer_name.endswith("correction_bias")]
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])


def _figure(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


@pytest.mark.parametrize("name", PRESETS)
def test_counts_beside_the_published(name: str) -> None:
    config = PRESETS[name]
    assert config.problems() == []
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in HybridLM(config).parameters())
    stock = _stock_count(name)
    figure = "none" if stock is None else f"{stock:,}"
    print(f"{name:24} ours {config.num_params():>14,}  stock {figure:>14}  published {PUBLISHED[name]}")
    assert config.num_params() == built
    assert stock in (None, built)
    # MoE-Mamba's sizes are without embeddings.
    embeddings = config.vocab_size * config.d_model if name.startswith("moe-mamba") else 0
    within = 0.005 if embeddings else 0.1
    assert built - embeddings == pytest.approx(_figure(PUBLISHED[name]), rel=within)


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE)
def test_active_counts_beside_the_published(name: str) -> None:
    config, published = PRESETS[name], PUBLISHED_ACTIVE[name]
    active, embeddings = config.num_active_params(), config.vocab_size * config.d_model
    print(f"{name:24} ours {active:>14,}  without an embedding {active - embeddings:>14,}  published {published}")
    within = 0.015
    assert active - embeddings * name.startswith("moe-mamba") == pytest.approx(_figure(published), rel=within)
    if name.startswith("nemotron"):
        assert active - embeddings == pytest.approx(3.2e9, rel=within)


def test_mamba2_130m_is_the_released_size() -> None:
    assert PRESETS["mamba2-130m"].num_params() == 128_989_632


def test_hybrid_has_the_published_layers() -> None:
    kinds = PRESETS["mamba2-hybrid-8b"].kinds
    assert [MEGATRON_LETTERS[letter] for letter in MAMBA2_HYBRID_8B] == list(kinds)
    assert {kind: kinds.count(kind) for kind in kinds} == {"mamba2": 24, "mlp": 28, "attention": 4}


def test_nano_has_the_published_layers() -> None:
    kinds = PRESETS["nemotron-3-nano-30b-a3b"].kinds
    assert {kind: kinds.count(kind) for kind in kinds} == {"mamba2": 23, "moe": 23, "attention": 6}
