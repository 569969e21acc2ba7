"""The selective scan and its summary: argument checks and the choice of a backend."""

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import needs_gradient
from .operator import selective_scan_operator
from .reference import selective_scan_reference

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A fused program keeps the states of its channels in registers.
_MOST_FUSED_STATES = 256
_MOST_ROWS = 65535  # in all dims of a grid but the first


def selective_scan(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_I: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba-1 over a sequence (Gu and Dao 2023, arXiv 2312.00752, algorithm 2).

    Args:
        x_BLI: inputs of I channels, float64, float32, bfloat16 or float16; any L >= 1. Sums and states are float32, or
            float64 when `x` is. May be a view of a wider tensor, as may dt, B and C; Triton needs their last dimension
            to be contiguous.
        dt_BLI: step sizes >= 0, after bias and softplus; any of these dtypes, as all that follows.
        A_IN: decay rates, negative.
        B_BLN: input projections, shared by all channels.
        C_BLN: output projections, shared by all channels.
        D_I: skip weights, or None.
        initial_state: `(B, I, N)`, or None for zero.
        reset: `(B, L)` bool, True where a new document starts: nothing from before reaches it.
        backend: as in `kernels.dispatch`; Triton takes N up to 256.

    Returns:
        `y_BLI` in the dtype of `x` and the final state `(B, I, N)`, float32 (float64 for float64 inputs). Gradients
        flow through both, to all tensors but `reset`.

    Raises:
        ValueError: shapes that do not fit together, dtypes that are not those above, a backend that cannot run, or a
            layout that it cannot take.
    """
    _check_arguments(x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, initial_state, reset)
    tensors = (x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, initial_state, reset)
    backend = _choose("selective_scan", backend, *tensors[:5])
    if backend == "reference":
        return selective_scan_reference(*tensors)
    keep_states = needs_gradient(*tensors)
    y_BLI, final_state, _ = selective_scan_operator(*tensors, keep_states, backend == "triton")
    return y_BLI, final_state


def selective_scan_summary(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Summarise a stretch of tokens by `(M_BIN, S_BIN)`: the state leaving it is `M * (state entering it) + S`.

    Shapes as in `selective_scan`; results are float32 (float64 for float64 inputs), with gradients. `M` is exactly 0
    when a document starts anywhere in the stretch; its transition class is `kernels.affine.DIAGONAL`. The backend
    "reference" is that of "torch". Raises ValueError like `selective_scan`.
    """
    _check_arguments(x_BLI, dt_BLI, A_IN, B_BLN, None, None, None, reset)
    backend = _choose("selective_scan_summary", backend, x_BLI, dt_BLI, A_IN, B_BLN, None)
    keep_states = needs_gradient(x_BLI, dt_BLI, A_IN, B_BLN)
    tensors = (x_BLI, dt_BLI, A_IN, B_BLN, None, None, None, reset)
    _, S_BIN, _ = selective_scan_operator(*tensors, keep_states, backend == "triton")
    M_BIN = torch.exp(dt_BLI.to(S_BIN.dtype).sum(1)[..., None] * A_IN.to(S_BIN.dtype))
    return M_BIN if reset is None else M_BIN.masked_fill(reset.any(1)[:, None, None], 0.0), S_BIN


def _check_arguments(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor | None,
    D_I: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument whose shape or dtype does not fit."""
    if x_BLI.dim() != 3 or A_IN.dim() != 2 or x_BLI.shape[1] < 1 or A_IN.shape[1] < 1:
        shapes = f"x has shape {tuple(x_BLI.shape)} and A {tuple(A_IN.shape)}"
        raise ValueError(f"{shapes}; give (B, L >= 1, I) and (I, N >= 1)")
    B, L, width = x_BLI.shape
    N = A_IN.shape[1]
    expected = {
        "x": (x_BLI, (B, L, width)),
        "dt": (dt_BLI, (B, L, width)),
        "A": (A_IN, (width, N)),
        "B": (B_BLN, (B, L, N)),
        "C": (C_BLN, (B, L, N)),
        "D": (D_I, (width,)),
        "initial_state": (initial_state, (B, width, N)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; with x {(B, L, width)} and N={N} give {shape}")
        if value is not None and value.dtype not in _DTYPES:
            raise ValueError(f"{name} is {value.dtype}; use float64, float32, bfloat16 or float16")
    if reset is not None and (reset.dtype != torch.bool or tuple(reset.shape) != (B, L)):
        raise ValueError(
            f"reset is {reset.dtype} of shape {tuple(reset.shape)}; give a bool mask of shape {(B, L)}, True where a "
            "new document starts"
        )


def _choose(operator: str, backend: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None) -> str:
    """Choose the backend; with Triton, raise a ValueError for a layout that its kernels cannot read."""
    obstacle = None
    if A.shape[1] > _MOST_FUSED_STATES:
        obstacle = f"state size N={A.shape[1]} is above {_MOST_FUSED_STATES}"
    if x.shape[0] > _MOST_ROWS:
        obstacle = f"{x.shape[0]} rows are more than {_MOST_ROWS} programs side by side"
    backend = choose_backend(operator, backend, x, obstacle)
    if backend == "triton":
        for name, value in {"x": x, "dt": dt, "B": B, "C": C}.items():
            if value is not None and value.shape[2] > 1 and value.stride(2) != 1:
                raise ValueError(
                    f"{name} has strides {value.stride()}; Triton needs its last dimension contiguous: give "
                    f"{name}.contiguous()"
                )
    return backend
