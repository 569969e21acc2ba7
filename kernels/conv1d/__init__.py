"""Causal depthwise convolution over time, with a halo from before and resets at document starts."""

from .reference import causal_conv1d_reference

def causal_conv1d(x_BLD, weight_DK, bias_D=None, *, activation="silu", initial_state=None, reset=None):
    return causal_conv1d_reference(x_BLD, weight_DK, bias_D, activation, initial_state, reset)

__all__ = ["causal_conv1d", "causal_conv1d_reference"]
