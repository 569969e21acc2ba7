"""The selective scan of Mamba-1: over a sequence, its summary, and one step for decoding."""

from .reference import selective_scan_reference, selective_scan_step
from .scan import selective_scan, selective_scan_summary

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step", "selective_scan_summary"]
