"""What a call is given, and which states its forward pass keeps for the backward pass."""

from typing import NamedTuple

from torch import Tensor

# Tokens between the states that the PyTorch path keeps. Longer chunks leave the cache, shorter ones spend their time on
# calls.
CHUNK = 32
# The same for Triton, whose programs read less from memory the longer chunks are.
FUSED_CHUNK = 48
# Channels of states that Triton keeps come in multiples of this, which blocks of channels divide: no masks then.
CHANNEL_PADDING = 64


class Inputs(NamedTuple):
    """What the forward pass is given; shapes as in `selective_scan`, C None for a summary."""

    x_BLI: Tensor
    dt_BLI: Tensor
    A_IN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor | None
    D_I: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None


def padded_state(A_IN: Tensor) -> tuple[int, int]:
    """Channels and state size of a state that Triton keeps."""
    width, N = A_IN.shape
    return -(-width // CHANNEL_PADDING) * CHANNEL_PADDING, 1 << (N - 1).bit_length()


def kept_shape(x_BLI: Tensor, A_IN: Tensor, *, fused: bool) -> tuple[int, ...]:
    """The shape of the states entering all chunks: `(chunks, B, N, I)`, or with Triton `(chunks, B, I, N)`, padded."""
    B, L, width = x_BLI.shape
    if fused:
        return -(-L // FUSED_CHUNK), B, *padded_state(A_IN)
    return -(-L // CHUNK), B, A_IN.shape[1], width
