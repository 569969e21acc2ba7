"""Published models, by name, with the sizes their authors released.

`mamba-*`: the released state-spaces/mamba-*-hf configurations (Gu and Dao 2023, arXiv:2312.00752, section 4.2;
vocabulary 50,277 padded to a multiple of 8).
`mamba2-*`: the released state-spaces/mamba2-* configurations (Dao and Gu 2024, arXiv:2405.21060, section 9.2;
vocabulary 50,277 padded to a multiple of 16). `mamba2-hybrid-8b`: Waleffe et al. 2024, arXiv:2406.07887, section 3,
with the released checkpoint's arguments (no positions, no biases, GELU, untied). Exact counts are those of the stock
transformers classes in the same settings; `tests/model/test_presets.py` prints them beside ours and the published.
"""

from .config import ModelConfig
from .ffns.mlp import MLPConfig
from .mixers.attention import AttentionConfig
from .mixers.mamba2 import Mamba2Config
from .pattern import from_megatron

MAMBA2_HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def _mamba1(d_model: int, num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=50280, d_model=d_model, pattern=f"{num_layers}*mamba1")


def _mamba2(d_model: int, num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=50288, d_model=d_model, pattern=f"{num_layers}*mamba2")


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
}

# As their authors name them: Mamba-1 and Mamba-2 by the total, the hybrid 8B rounded down.
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
}
