"""Language models from a layer pattern: configuration, modules, first values, presets."""

from .config import ModelConfig
from .lm import HybridLM
from .sequence import LayerStates, SequenceContext

__all__ = ["HybridLM", "LayerStates", "ModelConfig", "SequenceContext"]
