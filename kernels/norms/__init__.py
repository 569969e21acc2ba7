"""Root-mean-square norms, plain and gated."""

from .reference import gated_rms_norm_reference, rms_norm_reference

def rms_norm(x, weight, eps):
    return rms_norm_reference(x, weight, eps)

def gated_rms_norm(x, z, weight, eps, *, group_size=None, norm_before_gate=False):
    return gated_rms_norm_reference(x, z, weight, eps, group_size, norm_before_gate)

__all__ = ["gated_rms_norm", "gated_rms_norm_reference", "rms_norm", "rms_norm_reference"]
