"""Root-mean-square norms as operators with their own backward."""

from typing import Any

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .blocked import norm_backward, norm_forward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, 1910.07467).

    `x` is `(..., D)` in float64, float32, bfloat16 or float16, `weight` is `(D,)`; sums are float32 (float64 for
    float64 inputs), the result has the dtype of `x`. Raises ValueError when the shapes do not fit.
    """
    return _norm(x, None, weight, eps, None, False)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Compute the gated norm of Mamba-2 (arXiv 2405.21060, section 7.1): `norm(x * silu(z)) * weight`.

    With `norm_before_gate`, `norm(x) * weight * silu(z)`. `x` and `z` are `(..., D)`, `weight` is `(D,)`; the mean
    square is taken over groups of `group_size` neighbouring channels, over all D when None. Dtypes as in `rms_norm`.
    Raises ValueError when the shapes do not fit or `group_size` does not divide D.
    """
    return _norm(x, z, weight, eps, group_size, norm_before_gate)


def _norm(
    x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int | None, norm_before_gate: bool
) -> Tensor:
    D = x.shape[-1]
    group_size = D if group_size is None else group_size
    if weight.shape != (D,) or (z is not None and z.shape != x.shape):
        shapes = [None if value is None else tuple(value.shape) for value in (x, z, weight)]
        raise ValueError(f"x, z and weight have shapes {shapes}; give (..., D), the same, and (D,)")
    if group_size < 1 or D % group_size:
        raise ValueError(f"group_size={group_size} does not divide D={D}; use one that does")
    z_TD = None if z is None else z.reshape(-1, D)
    y_TD, _ = _norm_operator(x.reshape(-1, D), z_TD, weight, eps, group_size, norm_before_gate)
    return y_TD.view(x.shape)


@torch.library.custom_op("headrace::gated_rms_norm", mutates_args=())
def _norm_operator(
    x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    return norm_forward(x_TD, z_TD, weight_D, eps, group_size, norm_before_gate)


@_norm_operator.register_fake
def _(
    x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    T, D = x_TD.shape
    return x_TD.new_empty(T, D), x_TD.new_empty(T, D // group_size, dtype=compute_dtype(x_TD))


@torch.library.custom_op("headrace::gated_rms_norm_backward", mutates_args=())
def _norm_backward_operator(
    dy_TD: Tensor, x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, rstd_Tg: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backward(dy_TD, x_TD, z_TD, weight_D, rstd_Tg, norm_before_gate)


@_norm_backward_operator.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, rstd_Tg: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz = x_TD.new_empty((0, x_TD.shape[1]) if z_TD is None else z_TD.shape)
    return x_TD.new_empty(x_TD.shape), dz, weight_D.new_empty(weight_D.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_TD, z_TD, weight_D, _, _, ctx.norm_before_gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_TD, z_TD, weight_D, output[1])


def _backward(ctx: Any, dy_TD: Tensor, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    dx, dz, dweight = _norm_backward_operator(dy_TD, *saved, ctx.norm_before_gate)
    return dx, None if saved[1] is None else dz, dweight, None, None, None


_norm_operator.register_autograd(_backward, setup_context=_setup_context)
