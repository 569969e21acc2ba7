"""The fused path as a whole: which kernels a call launches, in order.

| call     | launches                                                                                          |
| -------- | ------------------------------------------------------------------------------------------------- |
| forward  | decays, products, scan                                                                            |
| backward | scan in reverse, gradients, sums of the parts; before them states, if the forward pass kept none |
| summary  | decays, states                                                                                    |

Where rows are cut into segments, states and compose come before each of these, to find what enters the segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .decays import FusedDecays, compute_fused_decays
from .gradients import ParameterGradients, scan_gradients
from .plan import Plan, make_plan
from .scan import empty_products, products_of_groups, scan_chunks
from .states import compose_segments, pass_states


class FusedInputs(NamedTuple):
    """What a call is given; shapes as in `ssd_scan`, C None for a summary."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor | None
    D: Tensor | None
    reset: Tensor | None


class Shared(NamedTuple):
    """What forward and backward passes share: the layout, decays, and products `C B^T` (None for a summary)."""

    plan: Plan
    decays: FusedDecays
    products: Tensor | None


def prepare(inputs: FusedInputs) -> Shared:
    """Lay out a call, compute its decays and products."""
    x, B, C = inputs.x_BLHP, inputs.B_BLGN, inputs.C_BLGN
    plan = make_plan(x, B)
    decays = compute_fused_decays(inputs.dt_BLH, inputs.A_H, inputs.reset, plan.chunk, x.dtype == torch.float32)
    return Shared(plan, decays, None if C is None else products_of_groups(B, C, plan))


def ssd_fused_forward(
    inputs: FusedInputs, initial_state: Tensor | None, shared: Shared, *, keep: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return `y_BLHP` (None without C), the final state `(B, H, P, N)` float32, and the states that enter spans.

    The last are None unless `keep`.
    """
    plan, decays, products = shared
    x, B, C = inputs.x_BLHP, inputs.B_BLGN, inputs.C_BLGN
    entering = _entering(x, B, shared, initial_state, reverse=False)
    if C is None or products is None:
        _, leaving, kept = pass_states(x, B, decays, plan, entering, reverse=False, keep=keep, segments=plan.segments)
        return None, leaving[:, -1].clone(), kept
    return scan_chunks(
        x, C, B, inputs.D, products, decays, plan, entering, reverse=False, keep=keep, segments=plan.segments
    )


def ssd_fused_summary(inputs: FusedInputs, shared: Shared) -> tuple[Tensor, Tensor]:
    """Return the total decay `(B, H)` and the state that leaves from zero, `(B, H, P, N)`, float32."""
    return _summary(inputs.x_BLHP, inputs.B_BLGN, shared, reverse=False)


def ssd_fused_reverse_summary(dy_BLHP: Tensor, inputs: FusedInputs, shared: Shared) -> Tensor:
    """Return what outputs give to the gradient of the state entering before the first token, `(B, H, P, N)`."""
    assert inputs.C_BLGN is not None
    return _summary(dy_BLHP, inputs.C_BLGN, shared, reverse=True)[1]


def ssd_fused_backward(
    dy_BLHP: Tensor | None,
    dfinal_BHPN: Tensor | None,
    inputs: FusedInputs,
    initial_state: Tensor | None,
    states: Tensor | None,
    shared: Shared,
) -> tuple[Tensor, ParameterGradients, Tensor]:
    """Return the gradient of x, those of the other inputs, and that of the initial state `(B, H, P, N)` float32.

    `states` are those that the forward pass kept, or None to compute them again. The gradient of C is None without C.
    """
    x, dt, A, B, C, D, _ = inputs
    plan, decays, products = shared
    # Without outputs all that travels back is the gradient of the final state: as with outputs that count for nothing.
    dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy_BLHP is None else dy_BLHP.contiguous()
    has_outputs = C is not None
    if C is None or products is None:
        C, products = torch.zeros(B.shape, dtype=B.dtype, device=B.device), empty_products(B, plan).zero_()
    if states is None:
        entering = _entering(x, B, shared, initial_state, reverse=False)
        _, _, states = pass_states(x, B, decays, plan, entering, reverse=False, keep=True, segments=plan.segments)
    dentering = _entering(dy, C, shared, dfinal_BHPN, reverse=True)
    dx, dinitial, dstates = scan_chunks(
        dy, B, C, D, products, decays, plan, dentering, reverse=True, keep=True, segments=plan.segments
    )
    assert states is not None
    assert dstates is not None
    grads = scan_gradients(dy, x, dt, A, B, C, D, products, decays, plan, states, dstates)
    return dx, grads if has_outputs else grads._replace(C_BLGN=None), dinitial


def _entering(
    values_BLHP: Tensor, keys_BLGN: Tensor, shared: Shared, state: Tensor | None, *, reverse: bool
) -> Tensor | None:
    """States that enter the segments of rows that `state` enters, `(B, segments, H, P, N)`; None for zeros."""
    plan, decays, _ = shared
    state = None if state is None else state.float().contiguous()[:, None]
    if plan.segments == 1:
        return state
    total, leaving, _ = pass_states(
        values_BLHP, keys_BLGN, decays, plan, None, reverse=reverse, keep=False, segments=plan.segments
    )
    return compose_segments(total, leaving, state, reverse=reverse)


def _summary(values_BLHP: Tensor, keys_BLGN: Tensor, shared: Shared, *, reverse: bool) -> tuple[Tensor, Tensor]:
    plan, decays, _ = shared
    total, leaving, _ = pass_states(
        values_BLHP, keys_BLGN, decays, plan, None, reverse=reverse, keep=False, segments=plan.segments
    )
    if plan.segments == 1:
        return total[:, 0], leaving[:, 0]
    entering = compose_segments(total, leaving, None, reverse=reverse)
    end = 0 if reverse else -1
    return total.prod(1), torch.addcmul(leaving[:, end], total[:, end, :, None, None], entering[:, end])
