"""The fused path as a whole: which kernels a call launches, in order.

| call     | launches                                                                             |
| -------- | ------------------------------------------------------------------------------------ |
| forward  | scan; with segments also a scan from zero and compose before it                      |
| backward | gradients, sums for B and C, sums for A and D; with segments also reverse and compose |

Programs walk their channels through time with the states in registers. Where rows and channels alone leave processors
idle, the sequence is cut into segments that are walked at once: a first pass finds what each segment does to a state,
`(M, S)` of the class DIAGONAL, and a short launch composes them.
"""

import torch
from torch import Tensor

from ..layout import Inputs, kept_shape
from .backward import launch_backward
from .forward import compose, launch_forward, launch_reverse
from .plan import make_plan


def selective_scan_forward(inputs: Inputs, keep_states: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return `y_BLI` (None when C is None), the final state `(B, I, N)`, and the states entering all chunks.

    The last are float32, as in `kept_shape`, or None unless `keep_states`. All last dimensions
    are contiguous.
    """
    x, A_IN, initial_state = inputs.x_BLI, inputs.A_IN, inputs.initial_state
    B, L, width = x.shape
    plan = make_plan("selective_scan_forward", inputs)
    y = None if inputs.C_BLN is None else torch.empty((B, L, width), dtype=x.dtype, device=x.device)
    final = torch.empty((B, *A_IN.shape), dtype=torch.float32, device=x.device)
    kept = None
    if keep_states:
        shape = kept_shape(x, A_IN, fused=True)
        new = torch.empty if shape[2] == width else torch.zeros  # kernels leave some of the padding alone
        kept = new(shape, dtype=torch.float32, device=x.device)
    entering = None if initial_state is None else initial_state.contiguous()
    if plan.segments > 1:
        local, decay = _segment_buffers(inputs, plan.segments)
        launch_forward(inputs, plan, None, None, None, local, decay)
        entering = compose(local, decay, entering, final, reverse=False)
    if plan.segments == 1 or y is not None or kept is not None:
        launch_forward(inputs, plan, entering, y, kept, final, None)
    return y, final, kept


def selective_scan_backward(
    dy_BLI: Tensor | None, dfinal_BIN: Tensor | None, inputs: Inputs, kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `x, dt, A, B, C, D, initial_state`; those of C and D are None where the inputs are.

    `kept` are the states the forward pass kept.
    """
    if inputs.C_BLN is None:
        dy_BLI = None
    elif dy_BLI is None:  # the gradients of C and D are zero then, and have to be written
        dy_BLI = torch.zeros(inputs.x_BLI.shape, dtype=inputs.x_BLI.dtype, device=inputs.x_BLI.device)
    else:
        dy_BLI = dy_BLI.contiguous()
    plan = make_plan("selective_scan_backward", inputs)
    leaving = None if dfinal_BIN is None else dfinal_BIN.contiguous()
    if plan.segments > 1:
        local, decay = _segment_buffers(inputs, plan.segments)
        launch_reverse(inputs, plan, dy_BLI, local, decay)
        leaving = compose(local, decay, leaving, None, reverse=True)
    return launch_backward(inputs, plan, dy_BLI, leaving, kept)


def _segment_buffers(inputs: Inputs, segments: int) -> tuple[Tensor, Tensor]:
    """For what every segment leaves from zero, and for its decay."""
    shape = (segments, inputs.x_BLI.shape[0], *inputs.A_IN.shape)
    local = torch.empty(shape, dtype=torch.float32, device=inputs.x_BLI.device)
    return local, torch.empty_like(local)
