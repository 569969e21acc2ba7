"""The gated norm of Mamba-2 where a group's channels lie on several tensor-parallel ranks."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..kernels.numerics import compute_dtype, one_operator
from ..model.norms import GatedRMSNorm


def spread_gated_norm(norm: GatedRMSNorm, x_BLd: Tensor, z_BLd: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """`GatedRMSNorm.forward` on this rank's channels. Collective over `group`: one small all-reduce each way."""
    groups = _group_of_block(len(norm.weight), norm.group_size, group, x_BLd.device)
    return _SpreadNorm.apply(x_BLd, z_BLd, norm.weight, norm, groups, group)


def _group_of_block(channels: int, group_size: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Which group each block of this rank's channels belongs to, as ones and zeros `(blocks, groups)`."""
    block = math.gcd(channels, group_size)
    first = dist.get_rank(group) * channels // block
    of_block = torch.arange(first, first + channels // block, device=device) * block // group_size
    return F.one_hot(of_block, channels * dist.get_world_size(group) // group_size)


class _SpreadNorm(torch.autograd.Function):
    """`kernels/norms/blocked.py` with its two sums over a group's channels taken over ranks.

    With u the norm's input and r = 1 / sqrt(mean(u^2) + eps), n = u r: `du = r (dn - n mean(n dn))`.
    """

    @staticmethod
    @one_operator()
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight_d: Tensor,
        norm: GatedRMSNorm,
        groups_bg: Tensor,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """One all-reduce of a number per token and group."""
        dtype = compute_dtype(x)
        gate = F.silu(z.to(dtype))
        u = x.to(dtype) if norm.norm_before_gate else gate * x
        ctx.group, ctx.norm, groups_bg = group, norm, groups_bg.to(dtype)
        rstd_b = (_group_means(u.square(), groups_bg, ctx) + norm.eps).rsqrt()
        ctx.save_for_backward(x, z, weight_d, groups_bg, rstd_b)
        y = _per_block(u, rstd_b) * weight_d
        return (y * gate if norm.norm_before_gate else y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """One all-reduce of a number per token and group."""
        x, z, weight_d, groups_bg, rstd_b = ctx.saved_tensors
        dtype, before_gate = rstd_b.dtype, ctx.norm.norm_before_gate
        dy, z = dy.to(dtype), z.to(dtype)
        gate = F.silu(z)
        normed = _per_block(x.to(dtype) if before_gate else gate * x, rstd_b)
        if before_gate:
            dz = torch.ops.aten.silu_backward(dy * normed * weight_d, z)
            dy = dy * gate
        dweight_d = (dy * normed).flatten(0, -2).sum(0)
        dnormed = dy * weight_d
        along_b = _group_means(normed * dnormed, groups_bg, ctx)
        du = _per_block(dnormed - _per_block(normed, along_b), rstd_b)
        if not before_gate:
            dz = torch.ops.aten.silu_backward(du * x, z)
            du = du * gate
        return du.to(x.dtype), dz.to(x.dtype), dweight_d.to(weight_d.dtype), None, None, None


def _group_means(values: Tensor, groups_bg: Tensor, ctx: Any) -> Tensor:
    """The mean over each group's channels on all ranks, for each block of this rank's channels `(..., blocks)`."""
    sums_g = values.unflatten(-1, (len(groups_bg), -1)).sum(-1) @ groups_bg
    dist.all_reduce(sums_g, group=ctx.group)
    return (sums_g / ctx.norm.group_size) @ groups_bg.t()


def _per_block(values: Tensor, factor_b: Tensor) -> Tensor:
    return (values.unflatten(-1, (factor_b.shape[-1], -1)) * factor_b[..., None]).flatten(-2)
