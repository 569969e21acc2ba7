"""Causal depthwise convolution over time, with a halo from before and resets at document starts."""

from .operator import causal_conv1d
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d", "causal_conv1d_reference"]
