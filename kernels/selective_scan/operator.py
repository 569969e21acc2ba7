"""The selective scan as custom operators, so that torch.compile and fake tensors take it as one piece."""

from typing import Any

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .chunked import selective_scan_backward, selective_scan_forward
from .layout import Inputs, kept_shape


@torch.library.custom_op("headrace::selective_scan", mutates_args=())
def selective_scan_operator(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor | None,
    D_I: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    keep_states: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y_BLI`, the final state, and the states entering the chunks as in `kept_shape`.

    `y` is empty when C is None, the last is empty unless `keep_states`. Arguments otherwise as in `selective_scan`.
    """
    inputs = Inputs(x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, initial_state, reset)
    if fused:
        from .fused import selective_scan_forward as fused_forward

        y, final_state, kept = fused_forward(inputs, keep_states)
    else:
        y, final_state, kept = selective_scan_forward(inputs, keep_states)
    return x_BLI.new_empty(0) if y is None else y, final_state, final_state.new_empty(0) if kept is None else kept


@selective_scan_operator.register_fake
def _(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor | None,
    D_I: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    keep_states: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x_BLI)
    return (
        x_BLI.new_empty(0 if C_BLN is None else x_BLI.shape),
        x_BLI.new_empty(x_BLI.shape[0], *A_IN.shape, dtype=dtype),
        x_BLI.new_empty(kept_shape(x_BLI, A_IN, fused=fused) if keep_states else (0,), dtype=dtype),
    )


@torch.library.custom_op("headrace::selective_scan_backward", mutates_args=())
def _backward_operator(
    dy_BLI: Tensor | None,
    dfinal_BIN: Tensor | None,
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor | None,
    D_I: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    kept: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, initial_state, reset)
    if fused:
        from .fused import selective_scan_backward as fused_backward

        grads = fused_backward(dy_BLI, dfinal_BIN, inputs, kept)
    else:
        grads = selective_scan_backward(dy_BLI, dfinal_BIN, inputs, kept)
    return tuple(x_BLI.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_backward_operator.register_fake
def _(
    dy_BLI: Tensor | None,
    dfinal_BIN: Tensor | None,
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor | None,
    D_I: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    kept: Tensor,
    fused: bool,
) -> tuple[Tensor, ...]:
    if initial_state is None:
        initial_state = kept.new_empty(x_BLI.shape[0], *A_IN.shape)
    given = (x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, initial_state)
    return tuple(x_BLI.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, fused = inputs
    kept = output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*tensors, kept)
    ctx.fused = fused


def _backward(ctx: Any, dy_BLI: Tensor | None, dfinal_BIN: Tensor | None, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    no_output = saved[4] is None
    grads = _backward_operator(None if no_output else dy_BLI, dfinal_BIN, *saved, ctx.fused)
    return *(None if value is None else grad for value, grad in zip(saved[:7], grads, strict=True)), None, None, None


selective_scan_operator.register_autograd(_backward, setup_context=_setup_context)
