"""The causal convolution as an operator with its own backward."""

from typing import Any

import torch
from torch import Tensor

from .blocked import conv1d_backward, conv1d_forward


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own K taps over past tokens, then apply SiLU, as in Mamba (arXiv 2312.00752).

    Args:
        x_BLD: inputs, float64, float32, bfloat16 or float16; any L >= 1, also below K - 1.
        weight_DK: taps, the last one for the token itself.
        bias_D: added before the activation, or None.
        activation: "silu" or None.
        initial_state: the K - 1 inputs before the first, `(B, K - 1, D)`, or None for zeros.
        reset: `(B, L)` bool, True where a new document starts: no tap reaches across.

    Returns:
        `y_BLD` in the dtype of `x`, and the last K - 1 inputs `(B, K - 1, D)`, zero where they belong to an earlier
        document than the last token. Gradients flow through both.

    Raises:
        ValueError: an unknown activation, or shapes that do not fit together.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} is not known; use 'silu' or None")
    B, L, D = x_BLD.shape
    if L < 1 or weight_DK.dim() != 2 or weight_DK.shape[0] != D:
        raise ValueError(f"x {tuple(x_BLD.shape)} and weight {tuple(weight_DK.shape)}; give (B, L >= 1, D) and (D, K)")
    expected = {"bias": (bias_D, (D,)), "initial_state": (initial_state, (B, weight_DK.shape[1] - 1, D))}
    expected["reset"] = (reset, (B, L))
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x_BLD.shape)} give {shape}")
    return _conv1d(x_BLD, weight_DK, bias_D, initial_state, reset, activation == "silu")


@torch.library.custom_op("headrace::causal_conv1d", mutates_args=())
def _conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return conv1d_forward(x_BLD, weight_DK, bias_D, initial_state, reset, silu)


@_conv1d.register_fake
def _(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    *tensors, silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _backward(ctx: Any, dy_BLD: Tensor | None, dfinal: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    dx, dweight, dbias, dinitial = _conv1d_backward(dy_BLD, dfinal, *saved, ctx.silu)
    bias, initial_state = saved[2:4]
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial, None, None


_conv1d.register_autograd(_backward, setup_context=_setup_context)
