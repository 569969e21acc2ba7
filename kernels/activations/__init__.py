"""Gated activations of feed-forward layers."""

from .reference import swiglu_reference

def swiglu(gate, up):
    return swiglu_reference(gate, up)

__all__ = ["swiglu", "swiglu_reference"]
