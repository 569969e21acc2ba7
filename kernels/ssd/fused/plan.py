"""How the fused path lays out a problem: chunks, spans of chunks that share one kept state, segments, tiles."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...launch import architecture, num_processors
from ...tiles import Tile, tile

# A segment of a sequence is worth its summary only when it is long.
CHUNKS_OF_A_SEGMENT = 16


@dataclass(frozen=True)
class Plan:
    """The layout of one call. All kernels of a call share its chunks, because decays count from their beginnings.

    Attributes:
        L, P, G, N: sizes of the problem.
        chunk: tokens of a chunk.
        span: chunks from one kept state to the next; the states between are computed again.
        block_p: head channels of one program; a state of `(block_p, block_n)` is carried in registers.
        segments: stretches of a row that are worked on at the same time.
        splits: parts of a group's heads whose gradients of B and C are summed apart.
        precision: how float32 products are computed.
        tiles: warps and stages of each kernel.
    """

    L: int
    P: int
    G: int
    N: int
    chunk: int
    span: int
    block_p: int
    segments: int
    splits: int
    precision: str
    tiles: Tile

    @property
    def chunks(self) -> int:
        """Chunks in a row."""
        return triton.cdiv(self.L, self.chunk)

    @property
    def spans(self) -> int:
        """Kept states in a row."""
        return triton.cdiv(self.chunks, self.span)

    @property
    def block_n(self) -> int:
        """Columns of a state in registers, N rounded up."""
        return max(16, triton.next_power_of_2(self.N))

    @property
    def column_block(self) -> int:
        """Columns of a state whose gradients one program computes."""
        return min(self.block_n, self.tiles["columns"])

    @property
    def column_blocks(self) -> int:
        """Programs that share the columns of a state."""
        return triton.cdiv(self.N, self.column_block)

    @property
    def gradients_p(self) -> int:
        """Head channels that a program of the gradients takes at a time."""
        return min(self.block_p, self.tiles["gradients_p"])

    @property
    def slice(self) -> int:
        """Columns of one product where columns are summed over."""
        return min(self.block_n, self.tiles["slice"])

    @property
    def blocks_p(self) -> int:
        """Programs that share a head."""
        return triton.cdiv(self.P, self.block_p)

    def segment_chunks(self, segments: int) -> int:
        """Chunks of one of `segments` segments, whole spans; the last segments may be shorter or empty."""
        return triton.cdiv(self.spans, segments) * self.span

    def constants(self) -> dict[str, Any]:
        """Kernel arguments that are the same in all kernels of a call that deal with states."""
        return {
            "chunks": self.chunks,
            "P": self.P,
            "N": self.N,
            "SPAN": self.span,
            "Q": self.chunk,
            "BLOCK_P": self.block_p,
            "PRECISION": self.precision,
        }

    def options(self, kernel: str) -> dict[str, int]:
        """Warps and stages of `scan`, `states` or `gradients`."""
        return {"num_warps": self.tiles[f"{kernel}_warps"], "num_stages": self.tiles[f"{kernel}_stages"]}

    def empty_states(self, x_BLHP: Tensor) -> Tensor:
        """Room for one state a span, `(B, spans, H, P, N)` like `x`; float32 for float16, which it may pass."""
        B, _, H, P = x_BLHP.shape
        dtype = torch.float32 if x_BLHP.dtype == torch.float16 else x_BLHP.dtype
        return x_BLHP.new_empty(B, self.spans, H, P, self.N, dtype=dtype)


def row_and_token(name: str, value: Tensor) -> dict[str, Any]:
    """Kernel arguments that tell how far apart rows and tokens of a tensor are."""
    return {f"{name}_row": value.stride(0), f"{name}_token": value.stride(1)}


def make_plan(x_BLHP: Tensor, B_BLGN: Tensor) -> Plan:
    """Lay out a call for the device of `x`."""
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    arch, processors = architecture(x_BLHP), num_processors(x_BLHP)
    exact = x_BLHP.dtype == torch.float32
    choice = tile("ssd_exact" if exact else "ssd", arch, f"n{max(64, triton.next_power_of_2(N))}")
    if x_BLHP.dtype == torch.float16:  # its conversions take registers that bfloat16 has over
        choice["gradients_p"] = choice.get("gradients_p_float16", choice["gradients_p"])
    block_p = min(choice["block_p"], max(16, triton.next_power_of_2(P)))
    chunks = triton.cdiv(L, choice["chunk"])
    column_blocks = triton.cdiv(N, choice["columns"])
    return Plan(
        L=L,
        P=P,
        G=G,
        N=N,
        chunk=choice["chunk"],
        span=choice["span"],
        block_p=block_p,
        segments=_segments(B * H * triton.cdiv(P, block_p), chunks, choice["span"], processors),
        splits=_splits(B * G * chunks * column_blocks, H // G, processors),
        # Three products of halves are as exact as one whole product, on tensor cores.
        precision="tf32x3" if exact and arch.startswith("sm_") else "ieee",
        tiles=choice,
    )


def _segments(programs: int, chunks: int, span: int, processors: int) -> int:
    """Cut rows where programs for whole rows leave a quarter of the processors idle."""
    if 4 * programs > 3 * processors:
        return 1
    longest = max(1, chunks // CHUNKS_OF_A_SEGMENT)
    wanted = min(longest, triton.cdiv(2 * processors, max(1, programs)))
    # Segments are whole spans: as many as that leaves filled.
    spans = triton.cdiv(chunks, span)
    return triton.cdiv(spans, triton.cdiv(spans, wanted))


def _splits(programs: int, heads: int, processors: int) -> int:
    """Split the heads of groups until two programs share a processor, or nothing is left to split."""
    wanted = min(heads, triton.cdiv(2 * processors, max(1, programs)))
    return triton.cdiv(heads, triton.cdiv(heads, wanted))
