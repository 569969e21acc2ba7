"""Root-mean-square norms, plain and gated."""

from .operator import gated_rms_norm, rms_norm
from .reference import gated_rms_norm_reference, rms_norm_reference

__all__ = ["gated_rms_norm", "gated_rms_norm_reference", "rms_norm", "rms_norm_reference"]
