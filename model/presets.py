"""Published models, by name, with the sizes their authors released.

`mamba-*`: the released state-spaces/mamba-*-hf configurations (Gu and Dao 2023, arXiv:2312.00752, section 4.2;
vocabulary 50,277 padded to a multiple of 8).
`mamba2-*`: the released state-spaces/mamba2-* configurations (Dao and Gu 2024, arXiv:2405.21060, section 9.2;
vocabulary 50,277 padded to a multiple of 16). `mamba2-hybrid-8b`: Waleffe et al. 2024, arXiv:2406.07887, section 3,
with the released checkpoint's arguments (no positions, no biases, GELU, untied).
`moe-mamba-*`: Pióro et al. 2024, arXiv:2401.04081, sizes without embeddings: 42 experts of two matrices, three times as
wide as the model, make the published totals, from which they and the 100M sizes were solved, as were those of
`blackmamba-1.5b`; no other source for them was at hand. Its Switch layers drop what is above an expert's capacity; ours
do not.
`blackmamba-*`: Anthony et al. 2024, arXiv:2402.01771, with the released arguments, whose width of an expert is that of
each of its first two matrices. The released weights differ: biases of routers, a final LayerNorm with bias, GELU as the
gate, and Sinkhorn on doubled logits until it converges.
`nemotron-3-nano-30b-a3b`: the released checkpoint's arguments; its named 3B active leave the input embedding out.
Exact counts are those of the stock transformers classes in the same settings, where there are such classes;
`tests/model/test_presets.py` prints them beside ours and the published.
"""

from .config import ModelConfig
from .ffns.mlp import MLPConfig
from .ffns.moe import MoEConfig
from .mixers.attention import AttentionConfig
from .mixers.mamba2 import Mamba2Config
from .pattern import from_megatron

NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
MAMBA2_HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def _mamba1(d_model: int, num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=50280, d_model=d_model, pattern=f"{num_layers}*mamba1")


def _mamba2(d_model: int, num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=50288, d_model=d_model, pattern=f"{num_layers}*mamba2")


def _moe_mamba(d_model: int, pairs: int) -> ModelConfig:
    switch = MoEConfig(num_experts=42, top_k=1, d_hidden=3 * d_model, activation="gelu")
    return ModelConfig(vocab_size=50257, d_model=d_model, pattern=f"{pairs}*(mamba1 moe)", moe=switch)


def _blackmamba(d_model: int, pairs: int, d_hidden: int) -> ModelConfig:
    experts = MoEConfig(num_experts=8, top_k=1, d_hidden=d_hidden, score="sigmoid", balance="sinkhorn")
    return ModelConfig(vocab_size=50304, d_model=d_model, pattern=f"{pairs}*(mamba1 moe)", moe=experts)


PRESETS: dict[str, ModelConfig] = {
    "mamba-130m": _mamba1(768, 24),
    "mamba-370m": _mamba1(1024, 48),
    "mamba-790m": _mamba1(1536, 48),
    "mamba-1.4b": _mamba1(2048, 48),
    "mamba-2.8b": _mamba1(2560, 64),
    "mamba2-130m": _mamba2(768, 24),
    "mamba2-370m": _mamba2(1024, 48),
    "mamba2-780m": _mamba2(1536, 48),
    "mamba2-1.3b": _mamba2(2048, 48),
    "mamba2-2.7b": _mamba2(2560, 64),
    "mamba2-hybrid-8b": ModelConfig(
        vocab_size=256000,
        d_model=4096,
        pattern=from_megatron(MAMBA2_HYBRID_8B),
        tie_embeddings=False,
        residual_in_fp32=False,
        mamba2=Mamba2Config(num_groups=8),
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        mlp=MLPConfig(d_hidden=16384, activation="gelu"),
    ),
    "moe-mamba-25m": _moe_mamba(512, 8),
    "moe-mamba-100m": _moe_mamba(768, 16),
    "blackmamba-1.5b": _blackmamba(1152, 15, 3072),
    "blackmamba-2.8b": _blackmamba(1472, 18, 3872),
    "nemotron-3-nano-30b-a3b": ModelConfig(
        vocab_size=131072,
        d_model=2688,
        pattern=from_megatron(NEMOTRON_3_NANO),
        tie_embeddings=False,
        residual_in_fp32=False,
        mamba2=Mamba2Config(num_heads=64, num_groups=8, chunk_size=128),
        attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128),
        moe=MoEConfig(
            num_experts=128,
            top_k=6,
            d_hidden=1856,
            activation="relu2",
            d_shared=3712,
            score="sigmoid",
            renormalize=True,
            scale=2.5,
            balance="bias",
        ),
    ),
}

# Totals as their authors give them (the hybrid 8B rounded down), and what a token meets of it; that of MoE-Mamba
# follows from the sizes above and was not read in a source.
PUBLISHED: dict[str, str] = {
    "mamba-130m": "130M",
    "mamba-370m": "370M",
    "mamba-790m": "790M",
    "mamba-1.4b": "1.4B",
    "mamba-2.8b": "2.8B",
    "mamba2-130m": "130M",
    "mamba2-370m": "370M",
    "mamba2-780m": "780M",
    "mamba2-1.3b": "1.3B",
    "mamba2-2.7b": "2.7B",
    "mamba2-hybrid-8b": "8B",
    "moe-mamba-25m": "542M",
    "moe-mamba-100m": "2439M",
    "blackmamba-1.5b": "1.5B",
    "blackmamba-2.8b": "2.8B",
    "nemotron-3-nano-30b-a3b": "31.6B",
}
PUBLISHED_ACTIVE: dict[str, str] = {
    "moe-mamba-25m": "26M",
    "moe-mamba-100m": "117M",
    "blackmamba-1.5b": "340M",
    "blackmamba-2.8b": "630M",
    "nemotron-3-nano-30b-a3b": "3.6B",
}
