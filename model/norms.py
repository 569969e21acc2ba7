"""Root-mean-square norms as modules; the arithmetic is in `kernels`."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels import add_rms_norm, gated_rms_norm, rms_norm
from .init import Constant
from .rules import REPLICATED, ParameterRule


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dim (Zhang and Sennrich 2019), in the weight's dtype."""

    parameter_rules: ClassVar = {"weight": ParameterRule(Constant(1.0), "norm", REPLICATED)}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan")))
        self.eps = eps

    def forward(self, x_BLD: Tensor, update_BLD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add `update` to the residual stream; return the norm of it in the weight's dtype, and the stream."""
        if update_BLD is None:
            return rms_norm(x_BLD, self.weight, self.eps).to(self.weight.dtype), x_BLD
        return add_rms_norm(x_BLD, update_BLD, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMS norm with a SiLU gate, over all channels or over groups of `group_size` of them (Dao and Gu 2024, 7.1)."""

    def __init__(self, width: int, eps: float, *, group_size: int, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan")))
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def forward(self, x_BLD: Tensor, z_BLD: Tensor) -> Tensor:
        """`norm(x * silu(z))`, or `norm(x) * silu(z)` when the norm comes before the gate."""
        return gated_rms_norm(
            x_BLD, z_BLD, self.weight, self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )
