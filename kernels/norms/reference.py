"""Root-mean-square norms by definition, in plain autograd code."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics import compute_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, 1910.07467)."""
    return gated_rms_norm_reference(x, None, weight, eps)


def gated_rms_norm_reference(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Compute the gated norm of Mamba-2, over groups of `group_size` channels; arguments as in `gated_rms_norm`."""
    dtype = compute_dtype(x)
    value = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        value = value * gate
    grouped = value.unflatten(-1, (-1, group_size or x.shape[-1]))
    normed = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        normed = normed * gate
    return normed.to(x.dtype)


def add_rms_norm_reference(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `x + update` and its norm in the dtype of `weight`; arguments as in `add_rms_norm`."""
    total = x + update
    dtype = compute_dtype(total)
    return rms_norm_reference(total.to(dtype), weight, eps).to(weight.dtype), total
