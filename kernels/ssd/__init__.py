"""State-space duality (Mamba-2): the scan over a sequence, its summary, and one step for decoding."""

from .monoid import compose, ssd_summary
from .reference import ssd_reference, ssd_step
from .scan import ssd_scan

__all__ = ["compose", "ssd_reference", "ssd_scan", "ssd_step", "ssd_summary"]
