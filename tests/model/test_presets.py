"""Sizes of the published models: ours, the stock class's of the same settings, and the published figure."""

import pytest
import torch

from headrace.model import HybridLM
from headrace.model.pattern import MEGATRON_LETTERS
from headrace.model.presets import MAMBA2_HYBRID_8B, PRESETS, PUBLISHED


def _stock_count(name: str) -> int:
    transformers = pytest.importorskip("transformers")
    config = PRESETS[name]
    if name == "mamba2-hybrid-8b":
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
        return sum(parameter.numel() for parameter in build(stock).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_counts_beside_the_published(name: str) -> None:
    config = PRESETS[name]
    assert config.problems() == []
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in HybridLM(config).parameters())
    stock = _stock_count(name)
    print(f"{name:18} ours {config.num_params():>13,}  stock {stock:>13,}  published {PUBLISHED[name]}")
    assert config.num_params() == built == stock
    unit = {"M": 1e6, "B": 1e9}[PUBLISHED[name][-1]]
    assert built / unit == pytest.approx(float(PUBLISHED[name][:-1]), rel=0.1)


def test_mamba2_130m_is_the_released_size() -> None:
    assert PRESETS["mamba2-130m"].num_params() == 128_989_632


def test_hybrid_has_the_published_layers() -> None:
    kinds = PRESETS["mamba2-hybrid-8b"].kinds
    assert [MEGATRON_LETTERS[letter] for letter in MAMBA2_HYBRID_8B] == list(kinds)
    assert {kind: kinds.count(kind) for kind in kinds} == {"mamba2": 24, "mlp": 28, "attention": 4}
