"""The SSD operator: checks its arguments and picks a backend."""

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import needs_gradient
from .fused_operator import check_layout, fused_obstacle, ssd_fused
from .operator import ssd_chunked
from .reference import ssd_reference


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
    keep_states: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run the SSD recurrence of Mamba-2 over a sequence (Dao and Gu 2024, arXiv 2405.21060).

    Args:
        x_BLHP: inputs, float64, float32, bfloat16 or float16; any L >= 1.
        dt_BLH: step sizes >= 0, after bias, softplus and limits.
        A_H: decay rates, negative.
        B_BLGN: input projections; G divides H, heads of a group are neighbours.
        C_BLGN: output projections.
        D: skip weights, `(H,)` or `(H, P)`, or None.
        chunk_size: at most this many tokens a chunk on the PyTorch path, which may take fewer where that is faster;
            kernels have chunks of their own. Results do not depend on it but for rounding.
        initial_state: `(B, H, P, N)`, or None for zero.
        reset: `(B, L)` bool, True where a new document starts: nothing from before reaches it.
        backend: "auto", "reference" (the recurrence itself, slow), "torch" or "triton" (`kernels/dispatch.py`). Kernels
            compute in float32 and multiply in the dtype of `x`, autocast or not; P and N are at most 256.
        keep_states: keep the states between chunks for the backward pass instead of computing them again.

    Returns:
        `y_BLHP` in the dtype of `x` and the final state `(B, H, P, N)`, float32 (float64 for float64 inputs).
        Gradients flow through both, to all tensors but `reset`.

    Raises:
        ValueError: an unknown backend or one that cannot run, a chunk size below 1, shapes or dtypes that do not fit
            together, strides that kernels cannot take.
    """
    check_arguments(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state, reset, chunk_size)
    backend = choose_backend("ssd_scan", backend, x_BLHP, fused_obstacle(x_BLHP, B_BLGN))
    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state)
    if backend == "reference":
        return ssd_reference(*tensors, reset)
    keep_states = keep_states and needs_gradient(*tensors)
    if backend == "triton":
        check_layout(x_BLHP, dt_BLH, B_BLGN, C_BLGN)
        y_BLHP, final_state, *_ = ssd_fused(*tensors, reset, keep_states)
    else:
        y_BLHP, final_state, _ = ssd_chunked(*tensors, reset, chunk_size, keep_states)
    return y_BLHP, final_state


def check_arguments(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> None:
    """Raise a ValueError that names the first argument whose shape does not fit the others, or a bad chunk size."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; use 64 when in doubt")
    if x_BLHP.dim() != 4 or B_BLGN.dim() != 4:
        raise ValueError(f"x and B have shapes {_shape(x_BLHP)} and {_shape(B_BLGN)}; give (B, L, H, P), (B, L, G, N)")
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    if L < 1 or H % max(G, 1):
        raise ValueError(f"L={L}, H={H}, G={G}: L must be at least 1 and G must divide H")
    expected = {
        "dt": (dt_BLH, (B, L, H)),
        "A": (A_H, (H,)),
        "B": (B_BLGN, (B, L, G, N)),
        "C": (C_BLGN, (B, L, G, N)),
        "D": (D, (H,) if D is not None and D.dim() == 1 else (H, P)),
        "initial_state": (initial_state, (B, H, P, N)),
        "reset": (reset, (B, L)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {_shape(value)}; with x of shape {_shape(x_BLHP)} give {shape}")
    for name, value in (("B", B_BLGN), ("C", C_BLGN)):
        if value is not None and value.dtype != x_BLHP.dtype:
            raise ValueError(f"{name} is {value.dtype} and x is {x_BLHP.dtype}; give one dtype")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}; give torch.bool, True where a document starts")


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
