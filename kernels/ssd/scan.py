"""The SSD operator: checks its arguments and picks a backend."""

from torch import Tensor

from ..numerics import needs_gradient
from .operator import ssd_chunked
from .reference import ssd_reference

BACKENDS = ("auto", "reference", "chunked")


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
        chunk_size: at most this many tokens a chunk; the backend may take fewer where that is faster. Results do not
            depend on it but for rounding.
        initial_state: `(B, H, P, N)`, or None for zero.
        reset: `(B, L)` bool, True where a new document starts: nothing from before reaches it.
        backend: "auto", "reference" (the recurrence itself, slow) or "chunked".
        keep_states: keep the states between chunks for the backward pass, `L / chunk_size` times `(H, P, N)` a row,
            instead of computing them again.

    Returns:
        `y_BLHP` in the dtype of `x` and the final state `(B, H, P, N)`, float32 (float64 for float64 inputs).
        Gradients flow through both, to all tensors but `reset`.

    Raises:
        ValueError: an unknown backend, a chunk size below 1, or shapes that do not fit together.
    """
    check_arguments(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state, reset, chunk_size)
    if backend == "reference":
        return ssd_reference(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state, reset)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not available here; use one of {', '.join(BACKENDS)}")
    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state)
    keep_states = keep_states and needs_gradient(*tensors)
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


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
