"""Output head and cross-entropy as one operator: a chunk of tokens at a time, gradients in the same pass.

The gradients of the loss sum are ready when the loss is, so the backward pass only scales them. Logits and
probabilities of one chunk share one buffer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import compute_dtype, needs_gradient

# Logits in memory at a time: small enough for a core's last cache, large enough to feed a GPU.
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 1 << 20, 1 << 28


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of a linear output head over tokens, without ever holding all logits.

    Args:
        x_TD: inputs of the head, float64, float32, bfloat16 or float16.
        weight_VD: the head, in the dtype of `x`.
        target_T: int64 in [0, V), or `ignore_index`.
        chunk_size: tokens whose logits exist at a time; None takes what fits the device.
        z_loss: weight of the sum of `logsumexp(logits)^2` (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Returns:
        The sum over all targets, float32 (float64 for float64 inputs), and the number of targets, int64, both
        scalars. Gradients flow from the sum to `x` and `weight`.

    Raises:
        ValueError: shapes that do not fit, a chunk size below 1.
        IndexError: a target outside [0, V).
    """
    shapes_fit = x_TD.dim() == 2 and target_T.shape == x_TD.shape[:1] and weight_VD.shape[1:] == x_TD.shape[1:]
    if not shapes_fit:
        shapes = tuple(x_TD.shape), tuple(weight_VD.shape), tuple(target_T.shape)
        raise ValueError(f"x, weight and target have shapes {shapes}; give (T, D), (V, D), (T,)")
    if chunk_size is None:
        logits = CPU_CHUNK_LOGITS if x_TD.device.type == "cpu" else GPU_CHUNK_LOGITS
        chunk_size = max(128, logits // weight_VD.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; leave it out when in doubt")
    options = (ignore_index, chunk_size, z_loss, needs_gradient(x_TD), needs_gradient(weight_VD))
    loss_sum, num_targets, _, _ = _loss(x_TD, weight_VD, target_T, *options)
    return loss_sum, num_targets


class _Chunk(NamedTuple):
    logits: Tensor  # becomes the gradient of the loss to them
    loss_sum: Tensor


def _loss_of_chunk(logits: Tensor, target: Tensor, counted: Tensor, z_loss: float, with_gradient: bool) -> _Chunk:
    """Compute the loss of one chunk and overwrite `logits` by its gradient, if asked."""
    index = target[:, None]
    chosen = logits.gather(1, index)
    peak = logits.amax(1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    log_total = total.log().add_(peak)
    loss = log_total - chosen
    if z_loss:
        loss = loss + z_loss * log_total.square()
    if with_gradient:
        scale = counted / total
        if z_loss:
            scale = scale * (1 + 2 * z_loss * log_total)
        weights.mul_(scale).scatter_add_(1, index, -counted)
    return _Chunk(weights, (loss * counted).sum())


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x_TD)
    loss_sum = x_TD.new_zeros((), dtype=dtype)
    dx_TD = x_TD.new_empty(x_TD.shape if grad_x else 0)
    dweight_VD = weight_VD.new_zeros(weight_VD.shape if grad_weight else 0, dtype=dtype)
    num_targets = (target_T != ignore_index).sum()
    for start in range(0, x_TD.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        x, target = x_TD[part], target_T[part]
        counted = target != ignore_index
        logits = (x @ weight_VD.t()).to(dtype)
        target = target.masked_fill(~counted, 0)
        chunk = _loss_of_chunk(logits, target, counted[:, None].to(dtype), z_loss, grad_x or grad_weight)
        loss_sum += chunk.loss_sum
        dlogits = chunk.logits.to(x.dtype)
        if grad_x:
            torch.mm(dlogits, weight_VD, out=dx_TD[part])
        if grad_weight and x.dtype == dtype:
            dweight_VD.addmm_(dlogits.t(), x)
        elif grad_weight:
            dweight_VD += dlogits.t() @ x
    return loss_sum, num_targets, dx_TD, dweight_VD.to(weight_VD.dtype)


@_loss.register_fake
def _(x_TD, weight_VD, target_T, ignore_index, chunk_size, z_loss, grad_x, grad_weight):  # type: ignore[no-untyped-def]
    loss_sum = x_TD.new_empty((), dtype=compute_dtype(x_TD))
    dx = x_TD.new_empty(x_TD.shape if grad_x else 0)
    return loss_sum, target_T.new_empty(()), dx, weight_VD.new_empty(weight_VD.shape if grad_weight else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, num_targets, dx_TD, dweight_VD = output
    ctx.grad_x, ctx.grad_weight = inputs[-2:]
    ctx.mark_non_differentiable(num_targets, dx_TD, dweight_VD)
    ctx.save_for_backward(dx_TD, dweight_VD)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple:
    dx_TD, dweight_VD = ctx.saved_tensors
    dx = dx_TD * dloss.to(dx_TD.dtype) if ctx.grad_x else None
    dweight = dweight_VD * dloss.to(dweight_VD.dtype) if ctx.grad_weight else None
    return dx, dweight, None, None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup_context)
