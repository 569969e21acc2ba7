"""Root-mean-square norms as operators with their own backward."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import compute_dtype
from .blocked import norm_backward, norm_forward
from .layout import as_rows, width_obstacle
from .reference import gated_rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, 1910.07467).

    `x` is `(..., D)` in float64, float32, bfloat16 or float16, `weight` is `(D,)`; sums are float32 (float64 for
    float64 inputs), the result has the dtype of `x`. `backend` as in `kernels.dispatch`; Triton reads views of a wider
    tensor as they lie and takes D up to 16384. Raises ValueError when the shapes do not fit, the backend cannot run, or
    Triton cannot read a layout.
    """
    return _norm("rms_norm", x, None, weight, eps, None, False, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute the gated norm of Mamba-2 (arXiv 2405.21060, section 7.1): `norm(x * silu(z)) * weight`.

    With `norm_before_gate`, `norm(x) * weight * silu(z)`. `x` and `z` are `(..., D)`, `weight` is `(D,)`; the mean
    square is taken over groups of `group_size` neighbouring channels, over all D when None. Dtypes, backends and errors
    as in `rms_norm`, and ValueError when `x` and `z` have different dtypes or `group_size` does not divide D.
    """
    return _norm("gated_rms_norm", x, z, weight, eps, group_size, norm_before_gate, backend)


def _norm(
    name: str,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    backend: str,
) -> Tensor:
    D = x.shape[-1]
    group_size = D if group_size is None else group_size
    if weight.shape != (D,) or (z is not None and z.shape != x.shape):
        shapes = [None if value is None else tuple(value.shape) for value in (x, z, weight)]
        raise ValueError(f"x, z and weight have shapes {shapes}; give (..., D), the same, and (D,)")
    if group_size < 1 or D % group_size:
        raise ValueError(f"group_size={group_size} does not divide D={D}; use one that does")
    if z is not None and z.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and z is {z.dtype}; give one dtype")
    backend = choose_backend(name, backend, x, width_obstacle(group_size))
    if backend == "reference":
        return gated_rms_norm_reference(x, z, weight, eps, group_size, norm_before_gate)
    fused = backend == "triton"
    x_BLD = as_rows(name, "x", x, fused)
    z_BLD = None if z is None else as_rows(name, "z", z, fused)
    y_BLD, _ = _norm_operator(x_BLD, z_BLD, weight, eps, group_size, norm_before_gate, fused)
    return y_BLD.view(x.shape)


@torch.library.custom_op("headrace::gated_rms_norm", mutates_args=())
def _norm_operator(
    x_BLD: Tensor,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    if fused:
        from . import fused as kernels

        return kernels.norm_forward(x_BLD, z_BLD, weight_D, eps, group_size, norm_before_gate)
    x_TD, z_TD = x_BLD.flatten(0, 1), None if z_BLD is None else z_BLD.flatten(0, 1)
    y_TD, rstd_Tg = norm_forward(x_TD, z_TD, weight_D, eps, group_size, norm_before_gate, x_BLD.dtype)
    return y_TD.view(x_BLD.shape), rstd_Tg


@_norm_operator.register_fake
def _(
    x_BLD: Tensor,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    B, L, D = x_BLD.shape
    return x_BLD.new_empty(B, L, D), x_BLD.new_empty(B * L, D // group_size, dtype=compute_dtype(x_BLD))


@torch.library.custom_op("headrace::gated_rms_norm_backward", mutates_args=())
def _norm_backward_operator(
    dy_BLD: Tensor,
    x_BLD: Tensor,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    rstd_Tg: Tensor,
    norm_before_gate: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if fused:
        from . import fused as kernels

        return kernels.norm_backward(dy_BLD.contiguous(), x_BLD, z_BLD, weight_D, rstd_Tg, norm_before_gate)
    z_TD = None if z_BLD is None else z_BLD.flatten(0, 1)
    dx_TD, dz_TD, dweight_D = norm_backward(
        dy_BLD.flatten(0, 1), x_BLD.flatten(0, 1), z_TD, weight_D, rstd_Tg, norm_before_gate
    )
    dz_BLD = dz_TD[None] if z_BLD is None else dz_TD.view(z_BLD.shape)
    return dx_TD.view(x_BLD.shape), dz_BLD, dweight_D


@_norm_backward_operator.register_fake
def _(
    dy_BLD: Tensor,
    x_BLD: Tensor,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    rstd_Tg: Tensor,
    norm_before_gate: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dz = x_BLD.new_empty((0, *x_BLD.shape[1:]) if z_BLD is None else z_BLD.shape)
    return x_BLD.new_empty(x_BLD.shape), dz, weight_D.new_empty(weight_D.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_BLD, z_BLD, weight_D, _, _, ctx.norm_before_gate, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_BLD, z_BLD, weight_D, output[1])


def _backward(ctx: Any, dy_BLD: Tensor, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    dx, dz, dweight = _norm_backward_operator(dy_BLD, *saved, ctx.norm_before_gate, ctx.fused)
    return dx, None if saved[1] is None else dz, dweight, None, None, None, None


_norm_operator.register_autograd(_backward, setup_context=_setup_context)
