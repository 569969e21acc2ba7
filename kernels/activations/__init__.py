"""Gated activations of feed-forward layers."""

from .operator import swiglu
from .reference import swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
