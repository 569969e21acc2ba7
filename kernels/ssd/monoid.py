"""SSD as an affine map of its state: what a stretch of tokens does to any state that enters it."""

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import needs_gradient
from .fused_operator import check_layout, fused_obstacle, ssd_fused
from .operator import ssd_chunked
from .reference import ssd_reference
from .scan import check_arguments


def compose(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join the summaries of two neighbouring stretches of one sequence, `(M2 M1, M2 S1 + S2)`.

    Each is `(M_BH, S_BHPN)` as returned by `ssd_summary`; `later` follows `earlier`. Associative, with the unit
    `(1, 0)`.
    """
    M2_BH, S2_BHPN = later
    M1_BH, S1_BHPN = earlier
    return M2_BH * M1_BH, torch.addcmul(S2_BHPN, M2_BH[..., None, None], S1_BHPN)


def ssd_summary(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    *,
    reset: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Summarise a stretch of tokens by `(M_BH, S_BHPN)`: the state leaving it is `M * (state entering it) + S`.

    Shapes as in `ssd_scan`; results are float32 (float64 for float64 inputs), with gradients. `M` is exactly 0 when
    a document starts anywhere in the stretch. Raises ValueError like `ssd_scan`.
    """
    check_arguments(x_BLHP, dt_BLH, A_H, B_BLGN, None, None, None, reset, chunk_size)
    backend = choose_backend("ssd_summary", backend, x_BLHP, fused_obstacle(x_BLHP, B_BLGN))
    keep_states = needs_gradient(x_BLHP, dt_BLH, A_H, B_BLGN)
    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, None, None, None, reset)
    if backend == "reference":
        _, S_BHPN = ssd_reference(x_BLHP, dt_BLH, A_H, B_BLGN, B_BLGN, reset=reset)
    elif backend == "torch":
        _, S_BHPN, _ = ssd_chunked(*tensors, chunk_size, keep_states)
    else:
        check_layout(x_BLHP, dt_BLH, B_BLGN, None)
        if not keep_states:
            return _fused_summary(x_BLHP, dt_BLH, A_H, B_BLGN, reset)
        _, S_BHPN, *_ = ssd_fused(*tensors, keep_states)
    M_BH = torch.exp(dt_BLH.to(S_BHPN.dtype).sum(1) * A_H.to(S_BHPN.dtype))
    return M_BH if reset is None else M_BH.masked_fill(reset.any(1)[:, None], 0.0), S_BHPN


def _fused_summary(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    from .fused import FusedInputs, prepare, ssd_fused_summary

    inputs = FusedInputs(x_BLHP, dt_BLH, A_H, B_BLGN, None, None, reset)
    return ssd_fused_summary(inputs, prepare(inputs))
