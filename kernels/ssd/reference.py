"""The SSD recurrence, one token at a time: the definition every faster path is judged by."""

import torch
from torch import Tensor

from ..numerics import compute_dtype


def ssd_reference(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, equation 2) over time.

    `a_t = exp(dt_t A)`, or 0 where `reset` is True; `S_t = a_t S_(t-1) + dt_t x_t B_t^T`; `y_t = S_t C_t + D x_t`.
    Shapes as in `ssd_scan`. Returns `y_BLHP` in the dtype of `x` and the final state `(B, H, P, N)` in float32
    (float64 for float64 inputs). Plain autograd code; memory grows as `L * H * P * N`.
    """
    dtype = compute_dtype(x_BLHP)
    B, L, H, P = x_BLHP.shape
    heads_per_group = H // B_BLGN.shape[2]
    x, dt = x_BLHP.to(dtype), dt_BLH.to(dtype)
    B_BLHN = B_BLGN.to(dtype).repeat_interleave(heads_per_group, dim=2)
    C_BLHN = C_BLGN.to(dtype).repeat_interleave(heads_per_group, dim=2)
    decay_BLH = torch.exp(dt * A_H.to(dtype))
    if reset is not None:
        decay_BLH = decay_BLH.masked_fill(reset[:, :, None], 0.0)
    state = x.new_zeros(B, H, P, B_BLGN.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(L):
        inflow = (dt[:, t, :, None] * x[:, t])[..., None] * B_BLHN[:, t, :, None, :]
        state = decay_BLH[:, t, :, None, None] * state + inflow
        outputs.append((state * C_BLHN[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x * D.to(dtype).reshape(H, -1)
    return y.to(x_BLHP.dtype), state


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the SSD recurrence by one token, for decoding.

    `state_BHPN` float32 or float64, `x_BHP`, `dt_BH` (after softplus and limits), `A_H`, `B_BGN`, `C_BGN`, `D` of
    shape `(H,)`, `(H, P)` or None. Returns `y_BHP` in the dtype of `x` and the new state; the old one is unchanged.
    """
    dtype = state_BHPN.dtype
    heads_per_group = x_BHP.shape[1] // B_BGN.shape[1]
    x, dt = x_BHP.to(dtype), dt_BH.to(dtype)
    B_BHN = B_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    C_BHN = C_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    decay_BH = torch.exp(dt * A_H.to(dtype))
    inflow = (dt[..., None] * x)[..., None] * B_BHN[:, :, None, :]
    state = torch.addcmul(inflow, decay_BH[..., None, None], state_BHPN)
    y = torch.matmul(state, C_BHN[..., None]).squeeze(-1)
    if D is not None:
        y = y + x * D.to(dtype).reshape(x.shape[1], -1)
    return y.to(x_BHP.dtype), state
