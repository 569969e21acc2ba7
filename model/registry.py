"""The kinds of layers: one line each. Every line is a word for patterns and a table of the model's configuration."""

from dataclasses import dataclass, field, fields

from .ffns.mlp import MLPConfig
from .ffns.moe import MoEConfig
from .layer import LayerConfig
from .mixers.attention import AttentionConfig, SlidingAttentionConfig
from .mixers.mamba1 import Mamba1Config
from .mixers.mamba2 import Mamba2Config


@dataclass(frozen=True, kw_only=True)
class LayerTables:
    """Options per layer kind; `ModelConfig` inherits these fields. A new layer is one file and one line here."""

    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mamba1: Mamba1Config = field(default_factory=Mamba1Config)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sliding_attention: SlidingAttentionConfig = field(default_factory=SlidingAttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)


LAYER_KINDS: dict[str, type[LayerConfig]] = {line.name: line.default_factory for line in fields(LayerTables)}  # type: ignore[misc]
