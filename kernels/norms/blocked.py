"""Gated and plain root-mean-square norms, block by block of tokens, with a hand-written backward.

Letters: `T` tokens, `D` channels, `g` groups of a token's channels, `S` channels of a group. With u the input of the
norm and r = 1 / sqrt(mean(u^2) + eps), the norm's backward is `du = r (dn - u r^2 mean(u dn))` for n = u r.
"""

import torch
from torch import Tensor

from ..numerics import blocks, compute_dtype, store, working_copy


def norm_forward(
    x_TD: Tensor,
    z_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the output in `y_dtype` and `1 / rms` per token and group, `(T, g)`."""
    T, D = x_TD.shape
    dtype = compute_dtype(x_TD)
    weight = weight_D.to(dtype)
    y_TD = torch.empty_like(x_TD, dtype=y_dtype, memory_format=torch.contiguous_format)
    rstd_Tg = torch.empty(T, D // group_size, dtype=dtype, device=x_TD.device)
    for block in blocks(T, D):
        gate = None if z_TD is None else torch.nn.functional.silu(z_TD[block].to(dtype))
        u = x_TD[block].to(dtype)
        if gate is not None and not norm_before_gate:
            u = gate.mul_(u)
        u_TgS = u.unflatten(-1, (-1, group_size))
        mean_square = torch.linalg.vecdot(u_TgS, u_TgS).div_(group_size)
        rstd = torch.rsqrt(mean_square.add_(eps), out=rstd_Tg[block])
        y = working_copy(y_TD[block], dtype)
        torch.mul(u_TgS, rstd[..., None], out=y.unflatten(-1, (-1, group_size)))
        y.mul_(weight)
        if gate is not None and norm_before_gate:
            y.mul_(gate)
        store(y_TD[block], y)
    return y_TD, rstd_Tg


def norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    z_TD: Tensor | None,
    weight_D: Tensor,
    rstd_Tg: Tensor,
    norm_before_gate: bool,
    dsum_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, `z` (empty when there is no gate) and `weight`.

    `dsum`, the gradient that `x` receives from elsewhere, is added to its own.
    """
    T, D = x_TD.shape
    dtype = rstd_Tg.dtype
    group_size = D // rstd_Tg.shape[1]
    weight = weight_D.to(dtype)
    dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    dz_TD = torch.empty_like(x_TD[:0] if z_TD is None else z_TD, memory_format=torch.contiguous_format)
    dweight_D = torch.zeros_like(weight)
    for block in blocks(T, D):
        x, dy, rstd = x_TD[block].to(dtype), dy_TD[block].to(dtype), rstd_Tg[block][..., None]
        z = None if z_TD is None else z_TD[block].to(dtype)
        gate = None if z is None else torch.nn.functional.silu(z)
        u = x if gate is None or norm_before_gate else x * gate
        u_TgS = u.unflatten(-1, (-1, group_size))
        normed = (u_TgS * rstd).flatten(-2)
        if gate is not None and norm_before_gate:
            dz_TD[block] = torch.ops.aten.silu_backward((dy * normed).mul_(weight), z)
            dy = dy * gate
        dweight_D += (dy * normed).sum(0)
        dnormed_TgS = (dy * weight).unflatten(-1, (-1, group_size))
        normed_TgS = normed.unflatten(-1, (-1, group_size))
        along = torch.linalg.vecdot(normed_TgS, dnormed_TgS).div_(group_size)[..., None]
        du = dnormed_TgS.addcmul_(normed_TgS, along, value=-1).mul_(rstd).flatten(-2)
        if gate is not None and not norm_before_gate:
            dz_TD[block] = torch.ops.aten.silu_backward(du * x, z)
            du = du.mul_(gate)
        dx_TD[block] = du if dsum_TD is None else du.add_(dsum_TD[block])
    return dx_TD, dz_TD, dweight_D.to(weight_D.dtype)
