"""Operators: pure functions on tensors, each with its definition (`reference.py`) beside its fast paths."""

# transformers, run from the repository root, takes this folder for the package `kernels` of the Hub and imports it by
# that name. Nothing may happen then: registering the operators a second time would free those in use.
if __name__ != "kernels":
    from .activations import swiglu
    from .conv1d import causal_conv1d
    from .embedding import embedding
    from .experts import expert_order, grouped_linear, permute, unpermute
    from .losses import linear_cross_entropy
    from .norms import add_rms_norm, gated_rms_norm, rms_norm
    from .selective_scan import selective_scan, selective_scan_step, selective_scan_summary
    from .ssd import compose, ssd_scan, ssd_step, ssd_summary

    __all__ = [
        "add_rms_norm",
        "causal_conv1d",
        "compose",
        "embedding",
        "expert_order",
        "gated_rms_norm",
        "grouped_linear",
        "linear_cross_entropy",
        "permute",
        "rms_norm",
        "selective_scan",
        "selective_scan_step",
        "selective_scan_summary",
        "ssd_scan",
        "ssd_step",
        "ssd_summary",
        "swiglu",
        "unpermute",
    ]
