"""The selective scan in Triton: fused forward and backward, in segments where rows and channels do not fill a card."""

from .path import selective_scan_backward, selective_scan_forward

__all__ = ["selective_scan_backward", "selective_scan_forward"]
