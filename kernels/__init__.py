"""Operators: pure functions on tensors, each with its definition (`reference.py`) beside its fast paths."""

from .activations import swiglu
from .conv1d import causal_conv1d
from .losses import linear_cross_entropy
from .norms import gated_rms_norm, rms_norm
from .ssd import compose, ssd_scan, ssd_step, ssd_summary

__all__ = [
    "causal_conv1d",
    "compose",
    "gated_rms_norm",
    "linear_cross_entropy",
    "rms_norm",
    "ssd_scan",
    "ssd_step",
    "ssd_summary",
    "swiglu",
]
