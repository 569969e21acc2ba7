"""A residual stream's sum and its norm as one operator: of the sum, its norm and `1 / rms`, only the norm is new."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import compute_dtype
from .blocked import norm_backward, norm_forward
from .layout import as_rows, width_obstacle
from .reference import add_rms_norm_reference

NAME = "add_rms_norm"


def add_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalise the sum for the next layer.

    `x` and `update` are `(..., D)`, `weight` is `(D,)`, each in float64, float32, bfloat16 or float16. The sum is in
    the wider dtype of `x` and `update`, rounded before it is normalised; its norm has the dtype of `weight`. Keeps the
    sum and a number per token for the backward pass. Backends and errors as in `rms_norm`.

    Returns:
        The norm of the sum, and the sum. Gradients flow from both.
    """
    D = x.shape[-1]
    if weight.shape != (D,) or update.shape != x.shape:
        shapes = [tuple(value.shape) for value in (x, update, weight)]
        raise ValueError(f"x, update and weight have shapes {shapes}; give (..., D), the same, and (D,)")
    obstacle = width_obstacle(D)
    if update.dtype == torch.float64:
        obstacle = "float64 updates have no Triton path"
    backend = choose_backend(NAME, backend, x, obstacle)
    if backend == "reference":
        return add_rms_norm_reference(x, update, weight, eps)
    fused = backend == "triton"
    x_BLD, update_BLD = as_rows(NAME, "x", x, fused), as_rows(NAME, "update", update, fused)
    normed_BLD, sum_BLD, _ = _add_norm(x_BLD, update_BLD, weight, eps, fused)
    return normed_BLD.view(x.shape), sum_BLD.view(x.shape)


@torch.library.custom_op("headrace::add_rms_norm", mutates_args=())
def _add_norm(
    x_BLD: Tensor, update_BLD: Tensor, weight_D: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if fused:
        from . import fused as kernels

        return kernels.add_norm_forward(x_BLD, update_BLD, weight_D, eps)
    sum_BLD = torch.add(x_BLD, update_BLD).contiguous()
    y_TD, rstd_T1 = norm_forward(sum_BLD.flatten(0, 1), None, weight_D, eps, len(weight_D), False, weight_D.dtype)
    return y_TD.view(sum_BLD.shape), sum_BLD, rstd_T1


@_add_norm.register_fake
def _(x_BLD: Tensor, update_BLD: Tensor, weight_D: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = x_BLD.shape
    total = x_BLD.new_empty(B, L, D, dtype=torch.promote_types(x_BLD.dtype, update_BLD.dtype))
    return weight_D.new_empty(B, L, D), total, total.new_empty(B * L, 1, dtype=compute_dtype(total))


@torch.library.custom_op("headrace::add_rms_norm_backward", mutates_args=())
def _add_norm_backward(
    dnormed_BLD: Tensor,
    dsum_BLD: Tensor | None,
    sum_BLD: Tensor,
    weight_D: Tensor,
    rstd_T1: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, of `update` (empty where it is that of `x`), and of `weight`."""
    dsum_BLD = None if dsum_BLD is None else dsum_BLD.contiguous()
    if fused:
        from . import fused as kernels

        dtypes = x_dtype, update_dtype
        dx, dupdate, dweight = kernels.add_norm_backward(
            dnormed_BLD.contiguous(), dsum_BLD, sum_BLD, weight_D, rstd_T1, dtypes
        )
        return dx, dx.new_empty(0) if dupdate is None else dupdate, dweight
    rows = dnormed_BLD.flatten(0, 1), sum_BLD.flatten(0, 1)
    dsum_TD = None if dsum_BLD is None else dsum_BLD.flatten(0, 1)
    dtotal_TD, _, dweight = norm_backward(*rows, None, weight_D, rstd_T1, False, dsum_TD)
    dtotal_BLD = dtotal_TD.view(sum_BLD.shape)
    dupdate = dtotal_BLD.new_empty(0) if x_dtype == update_dtype else dtotal_BLD.to(update_dtype, copy=True)
    return dtotal_BLD.to(x_dtype), dupdate, dweight


@_add_norm_backward.register_fake
def _(
    dnormed_BLD: Tensor,
    dsum_BLD: Tensor | None,
    sum_BLD: Tensor,
    weight_D: Tensor,
    rstd_T1: Tensor,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = sum_BLD.shape
    dupdate = sum_BLD.new_empty(0 if x_dtype == update_dtype else shape, dtype=update_dtype)
    return sum_BLD.new_empty(shape, dtype=x_dtype), dupdate, weight_D.new_empty(weight_D.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_BLD, update_BLD, weight_D, _, ctx.fused = inputs
    _, sum_BLD, rstd_T1 = output
    ctx.dtypes = x_BLD.dtype, update_BLD.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd_T1)
    ctx.save_for_backward(sum_BLD, weight_D, rstd_T1)


def _backward(ctx: Any, dnormed_BLD: Tensor | None, dsum_BLD: Tensor | None, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    if dnormed_BLD is None:
        dx, dupdate = (None if dsum_BLD is None else dsum_BLD.to(dtype) for dtype in ctx.dtypes)
        return dx, dupdate, None, None, None
    dx, dupdate, dweight = _add_norm_backward(dnormed_BLD, dsum_BLD, *saved, *ctx.dtypes, ctx.fused)
    return dx, dx if ctx.dtypes[0] == ctx.dtypes[1] else dupdate, dweight, None, None


_add_norm.register_autograd(_backward, setup_context=_setup_context)
