"""The selective scan in plain PyTorch, forward and backward, in chunks of time and tiles of rows and channels.

A tile's decays and inflows over one chunk stay within the processor's cache: both are computed for all tokens of the
chunk at once, the recurrence then takes one operation a token, and the products with B and C again take all tokens at
once. States are laid out `(rows, N, channels)`: whatever is spread over N reads contiguous channels. Only the states
that enter chunks are kept for the backward pass, which computes those within again.

Letters beyond the house's: `R` rows of a tile, `i` its channels, `Q` tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .layout import CHUNK, Inputs, kept_shape

# Elements in the state of a tile.
TILE_ELEMENTS = 1 << 13


class Tile(NamedTuple):
    """Rows of the batch and channels that are walked through time together."""

    rows: slice
    channels: slice
    starts: frozenset[int]  # tokens at which a document starts in any of the rows


class Chunk(NamedTuple):
    """What one tile's recurrence is made of over the tokens of one chunk, time first."""

    dt_QRi: Tensor
    dtx_QRi: Tensor
    B_QRN: Tensor
    decay_QRNi: Tensor
    inflow_QRNi: Tensor
    starts: list[tuple[int, Tensor]]  # tokens where documents start, with the rows `(R, 1, 1)` where they do


def chunk_starts(L: int) -> range:
    """The first tokens of all chunks."""
    return range(0, L, CHUNK)


def selective_scan_forward(inputs: Inputs, keep_states: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return `y_BLI` (None when C is None), the final state `(B, I, N)`, and the states entering all chunks.

    The last are `(chunks, B, N, I)`, or None unless `keep_states`.
    """
    x, _, A_IN, _, C, D, initial_state, _ = inputs
    B, L, _ = x.shape
    dtype = compute_dtype(x)
    y = None if C is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(B, *A_IN.shape, dtype=dtype)
    kept = x.new_empty(kept_shape(x, A_IN, fused=False), dtype=dtype) if keep_states else None
    for tile in _tiles(inputs):
        state = _entering(initial_state, final, tile)
        for number, first in enumerate(chunk_starts(L)):
            if kept is not None:
                kept[number, tile.rows, :, tile.channels] = state
            tokens = slice(first, min(first + CHUNK, L))
            chunk = _chunk(inputs, tile, tokens)
            states_QRNi = _advance(chunk, state)
            if y is not None and C is not None:
                y_QRi = torch.matmul(_time_first(C, tile.rows, tokens, dtype)[:, :, None], states_QRNi)[:, :, 0]
                if D is not None:
                    y_QRi.addcmul_(_time_first(x, tile.rows, tokens, dtype, tile.channels), D[tile.channels].to(dtype))
                y[tile.rows, tokens, tile.channels] = y_QRi.transpose(0, 1)
            state = states_QRNi[-1].clone()
        final[tile.rows, tile.channels] = state.transpose(1, 2)
    return y, final, kept


def selective_scan_backward(
    dy_BLI: Tensor | None, dfinal_BIN: Tensor | None, inputs: Inputs, kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `x, dt, A, B, C, D, initial_state`; those of C and D are None where the inputs are.

    `kept` are the states the forward pass kept.
    """
    x, dt, A_IN, B, C, D, initial_state, _ = inputs
    dtype = kept.dtype
    grads = Gradients(
        dx_BLI=torch.empty_like(x, memory_format=torch.contiguous_format),
        ddt_BLI=torch.empty_like(dt, memory_format=torch.contiguous_format),
        dA_NI=kept.new_zeros(kept.shape[2:]),
        dB_BLN=B.new_zeros(B.shape, dtype=dtype),
        dC_BLN=B.new_zeros(B.shape, dtype=dtype),
        dD_I=kept.new_zeros(kept.shape[3]),
    )
    dinitial = x.new_empty(x.shape[0], *A_IN.shape, dtype=dtype)
    for tile in _tiles(inputs):
        carry = _entering(dfinal_BIN, dinitial, tile)
        for number, first in reversed(list(enumerate(chunk_starts(x.shape[1])))):
            tokens = slice(first, min(first + CHUNK, x.shape[1]))
            entering = kept[number, tile.rows, :, tile.channels]
            carry = _backward_through_chunk(dy_BLI, inputs, tile, tokens, entering, carry, grads)
        dinitial[tile.rows, tile.channels] = carry.transpose(1, 2)
    return (
        grads.dx_BLI,
        grads.ddt_BLI,
        grads.dA_NI.t().to(A_IN.dtype).contiguous(),
        grads.dB_BLN.to(B.dtype),
        None if C is None else grads.dC_BLN.to(C.dtype),
        None if D is None else grads.dD_I.to(D.dtype),
        dinitial.to(dtype if initial_state is None else initial_state.dtype),
    )


class Gradients(NamedTuple):
    """Gradients that tiles and chunks fill in or add to."""

    dx_BLI: Tensor
    ddt_BLI: Tensor
    dA_NI: Tensor
    dB_BLN: Tensor
    dC_BLN: Tensor
    dD_I: Tensor


def _tiles(inputs: Inputs) -> Iterator[Tile]:
    """Cut rows and channels so that the state of each tile has about `TILE_ELEMENTS` elements."""
    B, _, width = inputs.x_BLI.shape
    N = inputs.A_IN.shape[1]
    channels = max(1, min(width, TILE_ELEMENTS // max(N, 1)))
    rows = max(1, TILE_ELEMENTS // max(channels * N, 1))
    for row in range(0, B, rows):
        part = slice(row, min(row + rows, B))
        starts: frozenset[int] = frozenset()
        if inputs.reset is not None:
            starts = frozenset(inputs.reset[part].any(0).nonzero().flatten().tolist())
        for channel in range(0, width, channels):
            yield Tile(part, slice(channel, min(channel + channels, width)), starts)


def _entering(state_BIN: Tensor | None, like_BIN: Tensor, tile: Tile) -> Tensor:
    """A tile of a state as `(R, N, i)` in the dtype of sums, zeros for None."""
    like = like_BIN[tile.rows, tile.channels].transpose(1, 2)
    if state_BIN is None:
        return like.new_zeros(like.shape)
    return like.new_empty(like.shape).copy_(state_BIN[tile.rows, tile.channels].transpose(1, 2))


def _time_first(
    value_BL: Tensor, rows: slice, tokens: slice, dtype: torch.dtype, channels: slice = slice(None)
) -> Tensor:
    return value_BL[rows, tokens, channels].transpose(0, 1).to(dtype)


def _chunk(inputs: Inputs, tile: Tile, tokens: slice) -> Chunk:
    dtype = compute_dtype(inputs.x_BLI)
    dt_QRi = _time_first(inputs.dt_BLI, tile.rows, tokens, dtype, tile.channels)
    dtx_QRi = dt_QRi * _time_first(inputs.x_BLI, tile.rows, tokens, dtype, tile.channels)
    B_QRN = _time_first(inputs.B_BLN, tile.rows, tokens, dtype)
    A_Ni = inputs.A_IN[tile.channels].t().to(dtype).contiguous()
    starts = []
    if inputs.reset is not None and tile.starts:
        for t in sorted(tile.starts.intersection(range(tokens.start, tokens.stop))):
            starts.append((t - tokens.start, inputs.reset[tile.rows, t, None, None]))
    decay_QRNi = torch.mul(dt_QRi[:, :, None], A_Ni).exp_()
    return Chunk(dt_QRi, dtx_QRi, B_QRN, decay_QRNi, dtx_QRi[:, :, None] * B_QRN[..., None], starts)


def _advance(chunk: Chunk, state: Tensor) -> Tensor:
    """Turn the inflows into the states after each token, in place; what precedes a document start is left out."""
    states = chunk.inflow_QRNi
    starts = dict(chunk.starts)
    for q, (decay, inflow) in enumerate(zip(chunk.decay_QRNi.unbind(), states.unbind(), strict=True)):
        if q in starts:
            state = state.masked_fill(starts[q], 0.0)
        state = torch.addcmul(inflow, decay, state, out=inflow)
    return states


def _backward_through_chunk(
    dy_BLI: Tensor | None,
    inputs: Inputs,
    tile: Tile,
    tokens: slice,
    entering: Tensor,
    carry: Tensor,
    grads: Gradients,
) -> Tensor:
    """Fill in a chunk's gradients and return that of the state entering it; `carry` is that of the state leaving it."""
    rows, channels = tile.rows, tile.channels
    chunk = _chunk(inputs, tile, tokens)
    states = _advance(chunk, entering)
    if dy_BLI is None or inputs.C_BLN is None:
        dstates = torch.zeros_like(states)
    else:
        dy_QRi = _time_first(dy_BLI, rows, tokens, states.dtype, channels)
        C_QRN = _time_first(inputs.C_BLN, rows, tokens, states.dtype)
        dstates = dy_QRi[:, :, None] * C_QRN[..., None]
        grads.dC_BLN[rows, tokens] += torch.matmul(states, dy_QRi[..., None])[..., 0].transpose(0, 1)
    carry = _retreat(chunk, dstates, carry)

    grads.dB_BLN[rows, tokens] += torch.matmul(dstates, chunk.dtx_QRi[..., None])[..., 0].transpose(0, 1)
    ddtx_QRi = torch.matmul(chunk.B_QRN[:, :, None], dstates)[:, :, 0]
    flow = _decayed(chunk, states, entering).mul_(dstates)  # gradients of the logarithms of decays
    A_Ni = inputs.A_IN[channels].t().to(flow.dtype)
    x_QRi = _time_first(inputs.x_BLI, rows, tokens, flow.dtype, channels)
    ddt_QRi = torch.mul(flow, A_Ni, out=dstates).sum(2).addcmul_(ddtx_QRi, x_QRi)
    grads.ddt_BLI[rows, tokens, channels] = ddt_QRi.transpose(0, 1)
    grads.dA_NI[:, channels] += flow.mul_(chunk.dt_QRi[:, :, None]).sum((0, 1))
    dx_QRi = ddtx_QRi.mul_(chunk.dt_QRi)
    if inputs.D_I is not None and dy_BLI is not None:
        dx_QRi.addcmul_(dy_QRi, inputs.D_I[channels].to(flow.dtype))
        grads.dD_I[channels] += (dy_QRi * x_QRi).sum((0, 1))
    grads.dx_BLI[rows, tokens, channels] = dx_QRi.transpose(0, 1)
    return carry


def _retreat(chunk: Chunk, dstates: Tensor, carry: Tensor) -> Tensor:
    """Add to what the outputs give each state what later tokens give it, in place; return what the chunk gives back."""
    starts = dict(chunk.starts)
    later, decays = dstates[-1].add_(carry), chunk.decay_QRNi.unbind()
    for q, dstate in reversed(list(enumerate(dstates[:-1].unbind()))):
        if q + 1 in starts:
            later = later.masked_fill(starts[q + 1], 0.0)
        later = torch.addcmul(dstate, decays[q + 1], later, out=dstate)
    carry = decays[0] * later
    return carry.masked_fill_(starts[0], 0.0) if 0 in starts else carry


def _decayed(chunk: Chunk, states: Tensor, entering: Tensor) -> Tensor:
    """What is left at each token of the state before it, in place of the decays."""
    decayed = chunk.decay_QRNi
    decayed[1:].mul_(states[:-1])
    decayed[0].mul_(entering)
    for q, row in chunk.starts:
        decayed[q].masked_fill_(row, 0.0)
    return decayed
