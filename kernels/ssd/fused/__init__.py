"""SSD in Triton: fused forward and backward, summaries, and their segments within a card."""

from .path import FusedInputs, Shared, prepare, ssd_fused_backward, ssd_fused_forward, ssd_fused_summary

__all__ = ["FusedInputs", "Shared", "prepare", "ssd_fused_backward", "ssd_fused_forward", "ssd_fused_summary"]
