"""Shapes that norms accept, and how their inputs lie in memory."""

from itertools import pairwise

from torch import Tensor

# Channels that one program of a Triton kernel can hold.
MAX_GROUP_SIZE = 16384


def width_obstacle(group_size: int) -> str | None:
    """Why the Triton kernels cannot take groups of so many channels, or None."""
    if group_size <= MAX_GROUP_SIZE:
        return None
    return f"groups of {group_size} channels are wider than {MAX_GROUP_SIZE}"


def as_rows(operator: str, name: str, x: Tensor, fused: bool) -> Tensor:
    """View `x` as `(B, L, D)`.

    Raises ValueError, when `fused`, for a layout that the Triton kernels cannot read. Other paths copy as needed.
    """
    x_BLD = x[(None,) * (3 - x.dim())] if x.dim() < 3 else x
    outer = [(size, stride) for size, stride in zip(x_BLD.shape[:-2], x_BLD.stride()[:-2], strict=True) if size > 1]
    evenly_spaced = all(before[1] == size * stride for before, (size, stride) in pairwise(outer))
    if fused and x.numel() and not (evenly_spaced and (x.shape[-1] == 1 or x.stride(-1) == 1)):
        raise ValueError(
            f"{operator}: {name} with strides {x.stride()} cannot be read by the kernel; pass {name}.contiguous()"
        )
    return x_BLD.flatten(0, -3)
