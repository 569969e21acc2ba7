"""Root-mean-square norms: plain, gated, and of a residual stream together with the sum that makes it."""

from .operator import gated_rms_norm, rms_norm
from .reference import add_rms_norm_reference, gated_rms_norm_reference, rms_norm_reference
from .residual import add_rms_norm

__all__ = [
    "add_rms_norm",
    "add_rms_norm_reference",
    "gated_rms_norm",
    "gated_rms_norm_reference",
    "rms_norm",
    "rms_norm_reference",
]
