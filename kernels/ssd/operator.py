"""The chunked SSD path as custom operators, so that torch.compile and fake tensors take it as one piece."""

from typing import Any

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .chunked import ssd_chunked_forward
from .chunked_backward import Inputs, ssd_chunked_backward
from .layout import chunk_length


@torch.library.custom_op("headrace::ssd_chunked", mutates_args=())
def ssd_chunked(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y_BLHP`, the final state, and the states entering the chunks.

    `y` is empty when C is None, the last is empty unless `keep_states`. Arguments otherwise as in `ssd_scan`.
    """
    y, final_state, states = ssd_chunked_forward(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state, reset, chunk_size
    )
    return x_BLHP.new_empty(0) if y is None else y, final_state, states if keep_states else states.new_empty(0)


@ssd_chunked.register_fake
def _(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = compute_dtype(x_BLHP)
    num_chunks = -(-L // chunk_length(L, P, N, chunk_size))
    states_shape = (B * num_chunks, G, N, H // G, P) if keep_states else (0,)
    return (
        x_BLHP.new_empty(0 if C_BLGN is None else x_BLHP.shape),
        x_BLHP.new_empty(B, H, P, N, dtype=dtype),
        x_BLHP.new_empty(states_shape, dtype=dtype),
    )


@torch.library.custom_op("headrace::ssd_chunked_backward", mutates_args=())
def _backward_operator(
    dy_BLHP: Tensor | None,
    dfinal_BHPN: Tensor | None,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state, reset)
    kept = states if states.numel() else None
    grads = ssd_chunked_backward(dy_BLHP, dfinal_BHPN, inputs, kept, chunk_size)
    return tuple(x_BLHP.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_backward_operator.register_fake
def _(
    dy_BLHP: Tensor | None,
    dfinal_BHPN: Tensor | None,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    B, _, H, P = x_BLHP.shape
    state_like = initial_state
    if initial_state is None:
        state_like = x_BLHP.new_empty(B, H, P, B_BLGN.shape[3], dtype=compute_dtype(x_BLHP))
    given = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, state_like)
    return tuple(x_BLHP.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, chunk_size, _ = inputs
    states = output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)
    ctx.chunk_size = chunk_size


def _backward(ctx: Any, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None, _: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    no_output = saved[4] is None
    grads = _backward_operator(None if no_output else dy_BLHP, dfinal_BHPN, *saved, ctx.chunk_size)
    return *(None if value is None else grad for value, grad in zip(saved[:7], grads, strict=True)), None, None, None


ssd_chunked.register_autograd(_backward, setup_context=_setup_context)
