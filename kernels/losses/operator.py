"""Output head and cross-entropy as one operator: gradients are ready when the loss is, the backward only scales."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import compute_dtype, needs_gradient
from .chunked import linear_cross_entropy_forward
from .reference import linear_cross_entropy_reference

# Logits in memory at a time: small enough for a core's last cache, large enough to feed a GPU.
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 1 << 21, 1 << 28
# Kernels number the bytes of a row of logits in 32 bits.
MAX_FUSED_ROWS = 1 << 28


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of a linear output head over tokens, without ever holding all logits.

    Args:
        x_TD: inputs of the head, float64, float32, bfloat16 or float16. Products of float32 inputs are full float32
            unless the process has given leave to round them (`torch.set_float32_matmul_precision`); logits of
            bfloat16 and float16 inputs have that dtype, what overflows shows as NaN or infinity.
        weight_VD: the head, in the dtype of `x`.
        target_T: int64 in [0, V), or `ignore_index`.
        chunk_size: tokens whose logits exist at a time; None takes what fits the device.
        z_loss: weight of the sum of `logsumexp(logits)^2` (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
        backend: as in `kernels.dispatch`; the Triton kernels take heads of up to 2^28 rows.

    Returns:
        The sum over all targets, float32 (float64 for float64 inputs), and the number of targets, int64, both
        scalars. Gradients flow from the sum to `x` and `weight`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a chunk size below 1, a backend that cannot run.
        RuntimeError: a target outside [0, V), with PyTorch on a CPU. On a GPU PyTorch stops the process there, and the
            Triton kernels give NaN: the sum, that token's gradient and the weight's.
    """
    _check(x_TD, weight_VD, target_T)
    if chunk_size is None:
        chunk_size = tokens_at_a_time(x_TD, weight_VD.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; leave it out when in doubt")
    backend = choose_backend("linear_cross_entropy", backend, x_TD, obstacle_of(weight_VD))
    if backend == "reference":
        return linear_cross_entropy_reference(x_TD, weight_VD, target_T, ignore_index, z_loss)
    options = (ignore_index, chunk_size, z_loss, needs_gradient(x_TD), needs_gradient(weight_VD), backend == "triton")
    loss_sum, num_targets, _, _ = _loss(x_TD, weight_VD, target_T, *options)
    return loss_sum, num_targets


def _check(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> None:
    if x_TD.dim() != 2 or target_T.shape != x_TD.shape[:1] or weight_VD.shape[1:] != x_TD.shape[1:]:
        shapes = tuple(x_TD.shape), tuple(weight_VD.shape), tuple(target_T.shape)
        raise ValueError(f"x, weight and target have shapes {shapes}; give (T, D), (V, D), (T,)")
    if weight_VD.dtype != x_TD.dtype:
        raise ValueError(f"x is {x_TD.dtype} and weight is {weight_VD.dtype}; give one dtype")
    if target_T.dtype != torch.int64:
        raise ValueError(f"target is {target_T.dtype}; give torch.int64")


def obstacle_of(weight_VD: Tensor) -> str | None:
    """Why the Triton kernels cannot take rows `weight` of a head, or None."""
    rows = weight_VD.shape[0]
    return None if rows <= MAX_FUSED_ROWS else f"{rows} rows of a head are more than {MAX_FUSED_ROWS}"


def tokens_at_a_time(x_TD: Tensor, rows: int) -> int:
    """How many tokens' logits over `rows` rows of a head exist at a time on the device of `x`."""
    logits = CPU_CHUNK_LOGITS if x_TD.device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(128, logits // rows)


@torch.library.custom_op("headrace::linear_cross_entropy", mutates_args=())
def _loss(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    chunk_size: int,
    z_loss: float,
    grad_x: bool,
    grad_weight: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_cross_entropy_forward(
        x_TD, weight_VD, target_T, ignore_index, chunk_size, z_loss, grad_x, grad_weight, fused=fused
    )


@_loss.register_fake
def _(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    chunk_size: int,
    z_loss: float,
    grad_x: bool,
    grad_weight: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_sum = x_TD.new_empty((), dtype=compute_dtype(x_TD))
    dx = x_TD.new_empty(x_TD.shape if grad_x else 0)
    return loss_sum, target_T.new_empty(()), dx, weight_VD.new_empty(weight_VD.shape if grad_weight else 0)


def scale_gradient(grad: Tensor, factor: Tensor, fused: bool) -> Tensor:
    """Return `grad * factor` in the dtype of `grad`, `factor` the scalar gradient of the loss; by Triton if `fused`.

    Multiplied in the dtype of the loss: rounded to bfloat16, the factor would be wrong by the same 0.2% everywhere.
    """
    if fused:
        return _scale(grad, factor)
    return (grad.to(factor.dtype) * factor).to(grad.dtype)


@torch.library.custom_op("headrace::scale_gradient", mutates_args=())
def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    from .fused import scale

    return scale(grad, factor)


@_scale.register_fake
def _(grad: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, num_targets, dx_TD, dweight_VD = output
    *ctx.wanted, ctx.fused = inputs[-3:]
    ctx.mark_non_differentiable(num_targets, dx_TD, dweight_VD)
    ctx.save_for_backward(dx_TD, dweight_VD)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple:
    grads = (
        scale_gradient(grad, dloss, ctx.fused) if wanted else None
        for grad, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return *grads, None, None, None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup_context)
