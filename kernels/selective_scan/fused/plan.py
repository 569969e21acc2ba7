"""How a call is laid out: tiles, segments, padding, and the arguments that all kernels walking through time take."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...launch import architecture, num_processors
from ...tiles import Tile, tile
from .. import layout
from ..layout import CHANNEL_PADDING, Inputs, padded_state

# Fewer segments are not worth the pass that finds what they do to a state.
_FEWEST_SEGMENTS = 4


class Plan(NamedTuple):
    """Block sizes, and how a row is cut: into `segments` of `span` chunks."""

    choice: Tile
    segments: int
    span: int


def make_plan(kernel: str, inputs: Inputs) -> Plan:
    """Lay out a call of `kernel`; from sizes and the device alone, so that the same call gives the same bits."""
    x, N = inputs.x_BLI, inputs.A_IN.shape[1]
    B, L, width = x.shape
    size = next(size for size in (16, 32, 64, 128, 256) if size >= N)
    choice = tile(kernel, architecture(x), f"n{size}")
    chunks = triton.cdiv(L, layout.FUSED_CHUNK)
    programs = B * triton.cdiv(width, choice["block_i"])
    wanted = choice["programs"] * num_processors(x) // max(programs, 1)
    span = triton.cdiv(chunks, max(1, min(wanted, chunks)))
    segments = triton.cdiv(chunks, span)
    return Plan(choice, segments, span) if segments >= _FEWEST_SEGMENTS else Plan(choice, 1, chunks)


def grid_of(inputs: Inputs, plan: Plan) -> tuple[int]:
    """One program for each segment of each row and each block of channels, neighbours in channels together."""
    B, _, width = inputs.x_BLI.shape
    return (B * plan.segments * triton.cdiv(width, plan.choice["block_i"]),)


def steps_and_decays(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """Arguments of every kernel that walks through time."""
    dt, A, C, reset = inputs.dt_BLI, inputs.A_IN, inputs.C_BLN, inputs.reset
    C_strides = (0, 0) if C is None else C.stride()
    reset_strides = (0, 0) if reset is None else reset.stride()
    return {
        "dt_ptr": dt,
        "A_ptr": A,
        "C_ptr": C,
        "reset_ptr": reset,
        "batch": dt.shape[0],
        "L": dt.shape[1],
        "width": dt.shape[2],
        "N": A.shape[1],
        "span": plan.span,
        "dt_stride_b": dt.stride(0),
        "dt_stride_t": dt.stride(1),
        "A_stride_i": A.stride(0),
        "A_stride_n": A.stride(1),
        "C_stride_b": C_strides[0],
        "C_stride_t": C_strides[1],
        "reset_stride_b": reset_strides[0],
        "reset_stride_t": reset_strides[1],
        "CHUNK": layout.FUSED_CHUNK,
        "STRIP": plan.choice["strip"],
        "BLOCK_N": padded_state(A)[1],
        "BLOCK_I": plan.choice["block_i"],
        "num_warps": plan.choice["num_warps"],
    }


def inflows(inputs: Inputs) -> dict[str, Any]:
    """Arguments of the kernels that see x, B and D too."""
    x, B, D = inputs.x_BLI, inputs.B_BLN, inputs.D_I
    return {
        "x_ptr": x,
        "B_ptr": B,
        "D_ptr": None if D is None else D.contiguous(),
        "x_stride_b": x.stride(0),
        "x_stride_t": x.stride(1),
        "B_stride_b": B.stride(0),
        "B_stride_t": B.stride(1),
        "PADDING": CHANNEL_PADDING,
    }


# The state of a program is a tile (BLOCK_N, BLOCK_I). The compiler spreads it over threads as it does the load of A, in
# which N is contiguous: a thread holds a few of both N and I, so that sums over either are short.
@triton.jit
def decay_rates(A_ptr, i, n, width, N, A_stride_i, A_stride_n):
    """The rows `n` and columns `i` of the transpose of A, float32, zero outside, to be raised to as powers of two."""
    inside = (n < N)[:, None] & (i < width)[None, :]
    A = tl.load(A_ptr + i[None, :] * A_stride_i + n[:, None] * A_stride_n, mask=inside, other=0.0)
    return A.to(tl.float32) * 1.4426950408889634  # 1 / ln 2
