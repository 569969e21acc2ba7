"""The selective scan of Mamba-1, one token at a time: the definition every faster path is judged by."""

import torch
from torch import Tensor

from ..numerics import compute_dtype


def selective_scan_reference(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_I: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba (Gu and Dao 2023, arXiv 2312.00752, equation 2 and algorithm 2) over time.

    `a_t = exp(dt_t A)`, or 0 where `reset` is True; `S_t = a_t S_(t-1) + dt_t x_t B_t`; `y_t = S_t C_t + D x_t`, each
    channel with N decays of its own. Shapes as in `selective_scan`. Returns `y_BLI` in the dtype of `x` and the final
    state `(B, I, N)` in float32 (float64 for float64 inputs). Plain autograd code; memory grows as `L * I * N`.
    """
    dtype = compute_dtype(x_BLI)
    x, dt = x_BLI.to(dtype), dt_BLI.to(dtype)
    decay_BLIN = torch.exp(dt[..., None] * A_IN.to(dtype))
    inflow_BLIN = (dt * x)[..., None] * B_BLN.to(dtype)[:, :, None]
    state = x.new_zeros(x.shape[0], *A_IN.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    tokens = zip(decay_BLIN.unbind(1), inflow_BLIN.unbind(1), C_BLN.to(dtype).unbind(1), strict=True)
    for t, (decay_BIN, inflow_BIN, C_BN) in enumerate(tokens):
        state = decay_BIN * state
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None], 0.0)
        state = state + inflow_BIN
        outputs.append((state * C_BN[:, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D_I is not None:
        y = y + x * D_I.to(dtype)
    return y.to(x_BLI.dtype), state


def selective_scan_step(
    state_BIN: Tensor,
    x_BI: Tensor,
    dt_BI: Tensor,
    A_IN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_I: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the selective scan by one token, for decoding.

    `state_BIN` float32 or float64, `x_BI`, `dt_BI` (after softplus), `A_IN`, `B_BN`, `C_BN`, `D_I` or None. Returns
    `y_BI` in the dtype of `x` and the new state; the old one is unchanged.
    """
    dtype = state_BIN.dtype
    x, dt = x_BI.to(dtype), dt_BI.to(dtype)
    inflow = (dt * x)[..., None] * B_BN.to(dtype)[:, None]
    state = torch.addcmul(inflow, torch.exp(dt[..., None] * A_IN.to(dtype)), state_BIN)
    y = torch.matmul(state, C_BN.to(dtype)[..., None]).squeeze(-1)
    if D_I is not None:
        y = y + x * D_I.to(dtype)
    return y.to(x_BI.dtype), state
