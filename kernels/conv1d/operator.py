"""The causal convolution as an operator with its own backward."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from .blocked import conv1d_backward, conv1d_forward
from .reference import causal_conv1d_reference

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A fused program keeps K inputs, gradients, taps and sums in registers.
_MOST_FUSED_TAPS = 8


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own K taps over past tokens, then apply SiLU, as in Mamba (arXiv 2312.00752).

    Args:
        x_BLD: inputs, float64, float32, bfloat16 or float16; any L >= 1, also below K - 1. Sums are in float32, or
            float64 when `x` is. May be a view of a wider tensor; Triton needs its channels to be contiguous.
        weight_DK: taps, the last one for the token itself; any of these dtypes, as all that follows.
        bias_D: added before the activation, or None.
        activation: "silu" or None.
        initial_state: the K - 1 inputs before the first, `(B, K - 1, D)`, or None for zeros; rounded to the dtype of
            `x`.
        reset: `(B, L)` bool, True where a new document starts: no tap reaches across.
        backend: as in `kernels.dispatch`.

    Returns:
        `y_BLD` in the dtype of `x`, and the last K - 1 inputs `(B, K - 1, D)`, zero where they belong to an earlier
        document than the last token. Gradients flow through both.

    Raises:
        ValueError: an unknown activation, shapes that do not fit together, dtypes that are not those above, a backend
            that cannot run, or a layout that it cannot take.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} is not known; use 'silu' or None")
    _check_shapes(x_BLD, weight_DK, bias_D, initial_state, reset)
    _check_dtypes(x_BLD, weight_DK, bias_D, initial_state, reset)
    K = weight_DK.shape[1]
    obstacle = f"{K} taps, its kernel takes up to {_MOST_FUSED_TAPS}" if K > _MOST_FUSED_TAPS else None
    backend = choose_backend("causal_conv1d", backend, x_BLD, obstacle)
    if backend == "reference":
        y_BLD, final_state = causal_conv1d_reference(x_BLD, weight_DK, bias_D, activation, initial_state, reset)
        return y_BLD.to(x_BLD.dtype), final_state
    if backend == "triton":
        _check_channels_contiguous(x_BLD, initial_state)
    return _conv1d(x_BLD, weight_DK, bias_D, initial_state, reset, activation == "silu", backend == "triton")


def _check_shapes(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None
) -> None:
    sizes = f"x {tuple(x_BLD.shape)} and weight {tuple(weight_DK.shape)}"
    if x_BLD.dim() != 3 or weight_DK.dim() != 2 or x_BLD.shape[1] < 1 or weight_DK.shape[1] < 1:
        raise ValueError(f"{sizes}; give (B, L >= 1, D) and (D, K >= 1)")
    B, L, D = x_BLD.shape
    if weight_DK.shape[0] != D:
        raise ValueError(f"{sizes}; give (B, L >= 1, D) and (D, K >= 1)")
    expected = {"bias": (bias_D, (D,)), "initial_state": (initial_state, (B, weight_DK.shape[1] - 1, D))}
    expected["reset"] = (reset, (B, L))
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x_BLD.shape)} give {shape}")


def _check_dtypes(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None
) -> None:
    for name, value in {"x": x_BLD, "weight": weight_DK, "bias": bias_D, "initial_state": initial_state}.items():
        if value is not None and value.dtype not in _DTYPES:
            raise ValueError(f"{name} is {value.dtype}; use float64, float32, bfloat16 or float16")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}; give a bool mask, True where a new document starts")


def _check_channels_contiguous(x_BLD: Tensor, initial_state: Tensor | None) -> None:
    for name, value in {"x": x_BLD, "initial_state": initial_state}.items():
        if value is not None and value.shape[2] > 1 and value.stride(2) != 1:
            raise ValueError(
                f"{name} has strides {value.stride()}; Triton needs stride 1 along channels: give {name}.contiguous()"
            )


@torch.library.custom_op("headrace::causal_conv1d", mutates_args=())
def _conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    if fused:
        from .fused import conv1d_forward as fused_forward

        return fused_forward(x_BLD, weight_DK, bias_D, initial_state, reset, silu)
    return conv1d_forward(x_BLD, weight_DK, bias_D, initial_state, reset, silu)


@_conv1d.register_fake
def _(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    B, _, D = x_BLD.shape
    return x_BLD.new_empty(x_BLD.shape), x_BLD.new_empty(B, weight_DK.shape[1] - 1, D)


@torch.library.custom_op("headrace::causal_conv1d_backward", mutates_args=())
def _conv1d_backward(
    dy_BLD: Tensor | None,
    dfinal: Tensor | None,
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if fused:
        from .fused import conv1d_backward as fused_backward

        dy_BLD = None if dy_BLD is None else dy_BLD.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        return fused_backward(dy_BLD, dfinal, x_BLD, weight_DK, bias_D, initial_state, reset, silu)
    return conv1d_backward(dy_BLD, dfinal, x_BLD, weight_DK, bias_D, initial_state, reset, silu)


@_conv1d_backward.register_fake
def _(
    dy_BLD: Tensor | None,
    dfinal: Tensor | None,
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, D = x_BLD.shape
    bias = weight_DK.new_empty(D) if bias_D is None else bias_D.new_empty(D)
    halo = x_BLD if initial_state is None else initial_state
    return (
        x_BLD.new_empty(x_BLD.shape),
        weight_DK.new_empty(weight_DK.shape),
        bias,
        halo.new_empty(B, weight_DK.shape[1] - 1, D),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, silu, fused = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.flags = silu, fused


def _backward(ctx: Any, dy_BLD: Tensor | None, dfinal: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    dx, dweight, dbias, dinitial = _conv1d_backward(dy_BLD, dfinal, *saved, *ctx.flags)
    bias, initial_state = saved[2:4]
    dbias, dinitial = None if bias is None else dbias, None if initial_state is None else dinitial
    return dx, dweight, dbias, dinitial, None, None, None


_conv1d.register_autograd(_backward, setup_context=_setup_context)
