"""The causal depthwise convolution, one tap at a time: the definition the fast path is judged by."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_reference(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `y_t = act(bias + sum_k weight_k x_(t-K+1+k))`, where no tap reaches across a reset.

    Shapes and results as in `causal_conv1d`. Plain autograd code.
    """
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    halo = x_BLD.new_zeros(B, K - 1, D) if initial_state is None else initial_state.to(x_BLD.dtype)
    inputs = torch.cat([halo, x_BLD], dim=1)
    starts = torch.zeros(B, L + K - 1, dtype=torch.long, device=x_BLD.device)
    if reset is not None:
        starts[:, K - 1 :] = reset
    document = starts.cumsum(1)
    y = x_BLD.new_zeros(B, L, D)
    for tap in range(K):
        seen = document[:, tap : tap + L] == document[:, K - 1 :]
        y = y + weight_DK[:, tap] * inputs[:, tap : tap + L] * seen[:, :, None]
    if bias_D is not None:
        y = y + bias_D
    seen = document[:, L:] == document[:, -1:]
    return F.silu(y) if activation == "silu" else y, inputs[:, L:] * seen[:, :, None]
