"""The Triton SSD path as custom operators: what forward and backward share is returned, and kept for the backward."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .fused import FusedInputs, Shared

LARGEST = 256
LARGEST_GRID = 65535  # in all dims of a grid but the first


def fused_obstacle(x_BLHP: Tensor, B_BLGN: Tensor) -> str | None:
    """Why the kernels cannot take these sizes, or None."""
    for name, size in (("head_dim", x_BLHP.shape[3]), ("d_state", B_BLGN.shape[3])):
        if size > LARGEST:
            return f"{name}={size} is above {LARGEST}"
    if x_BLHP.shape[0] * B_BLGN.shape[2] > LARGEST_GRID:
        return f"{x_BLHP.shape[0]} rows of {B_BLGN.shape[2]} groups are more than {LARGEST_GRID} programs side by side"
    return None


def check_layout(x_BLHP: Tensor, dt_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor | None) -> None:
    """Raise a ValueError for strides that the kernels would have to copy away; batch and token strides are free."""
    for name, value in (("x", x_BLHP), ("dt", dt_BLH), ("B", B_BLGN), ("C", C_BLGN)):
        if value is None:
            continue
        packed = value.stride(-1) == 1 or value.shape[-1] == 1
        if value.dim() == 4 and value.shape[2] > 1:
            packed = packed and value.stride(2) == value.shape[3]
        if not packed:
            raise ValueError(
                f"{name} has strides {value.stride()}; the dims after L must be packed: {name}.contiguous()"
            )


@torch.library.custom_op("headrace::ssd_fused", mutates_args=())
def ssd_fused(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `y_BLHP`, the final state, the states that enter spans, and what `_pack` makes of the shared tensors.

    `y` is empty when C is None, the states unless `keep_states`. Arguments otherwise as in `ssd_scan`.
    """
    from .fused import FusedInputs, prepare, ssd_fused_forward

    inputs = FusedInputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, reset)
    shared = prepare(inputs)
    y, final_state, states = ssd_fused_forward(inputs, initial_state, shared, keep=keep_states)
    empty = x_BLHP.new_empty(0)
    return empty if y is None else y, final_state, empty.clone() if states is None else states, *_pack(shared, empty)  # type: ignore[return-value]


@ssd_fused.register_fake
def _(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, ...]:
    from .fused.decays import empty_decays
    from .fused.path import Shared
    from .fused.plan import make_plan
    from .fused.scan import empty_products

    B, _, H, P = x_BLHP.shape
    plan = make_plan(x_BLHP, B_BLGN)
    decays = empty_decays(dt_BLH, reset, plan.chunk, x_BLHP.dtype == torch.float32)
    shared = Shared(plan, decays, None if C_BLGN is None else empty_products(B_BLGN, plan))
    y = x_BLHP.new_empty(0 if C_BLGN is None else x_BLHP.shape)
    states = plan.empty_states(x_BLHP) if keep_states else x_BLHP.new_empty(0)
    empty = x_BLHP.new_empty(0)
    return y, x_BLHP.new_empty(B, H, P, B_BLGN.shape[3], dtype=torch.float32), states, *_pack(shared, empty)


def _pack(shared: "Shared", empty: Tensor) -> tuple[Tensor, ...]:
    """The tensors of decays and products, an empty one for each that is None."""
    return tuple(empty.clone() if value is None else value for value in (*shared.decays, shared.products))


def _unpack(inputs: "FusedInputs", packed: tuple[Tensor, ...]) -> "Shared":
    from .fused.decays import FusedDecays
    from .fused.path import Shared
    from .fused.plan import make_plan

    *decays, products = (value if value.numel() else None for value in packed)
    return Shared(make_plan(inputs.x_BLHP, inputs.B_BLGN), FusedDecays(*decays), products)  # type: ignore[arg-type]


@torch.library.custom_op("headrace::ssd_fused_backward", mutates_args=())
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
    dt: Tensor,
    log: Tensor,
    log_low: Tensor,
    from_: Tensor,
    from_low: Tensor,
    start: Tensor,
    products: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .fused import FusedInputs, ssd_fused_backward

    inputs = FusedInputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, reset)
    shared = _unpack(inputs, (dt, log, log_low, from_, from_low, start, products))
    kept = states if states.numel() else None
    dx, grads, dinitial = ssd_fused_backward(dy_BLHP, dfinal_BHPN, inputs, initial_state, kept, shared)
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    return tuple(x_BLHP.new_empty(0) if grad is None else grad for grad in (dx, *grads, dinitial))  # type: ignore[return-value]


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
    *_: Tensor | None,
) -> tuple[Tensor, ...]:
    B, _L, H, P = x_BLHP.shape
    if initial_state is None:
        initial_state = x_BLHP.new_empty(B, H, P, B_BLGN.shape[3], dtype=torch.float32)
    given = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state)
    return tuple(x_BLHP.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None, *_: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
    no_output = saved[4] is None
    grads = _backward_operator(None if no_output else dy_BLHP, dfinal_BHPN, *saved)
    return *(None if value is None else grad for value, grad in zip(saved[:7], grads, strict=True)), None, None


ssd_fused.register_autograd(_backward, setup_context=_setup_context)
