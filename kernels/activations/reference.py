"""Gated activations by definition, in plain autograd code."""

from torch import Tensor
from torch.nn import functional as F


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu(gate) * up` (Shazeer 2020, arXiv 2002.05202, equation 6)."""
    return F.silu(gate) * up
