"""SSD by chunks in plain PyTorch, forward and backward: matrix products within chunks, a short scan between them.

Mamba-2's block decomposition (Dao and Gu 2024, arXiv 2405.21060, section 6) with a hand-written backward. Chunks are
processed in blocks, so that the `Q x Q` matrices of a block live in cache and never all at once; memory is linear in
L. Heads of a group share B and C, and their products are joined: `(N, Q) @ (Q, h * P)`. States between chunks are
laid out `(rows, chunks, G, N, h * P)` for that reason.
"""

import torch
from torch import Tensor

from ..numerics import store, working_copy
from .layout import (
    Chunks,
    Decays,
    compute_decays,
    cut_into_chunks,
    decay_matrix,
    group_to_tokens,
    scale_by_group,
    scale_by_head,
)


def ssd_chunked_forward(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return `y_BLHP` (None when C is None), the final state `(B, H, P, N)`, and the states that enter the chunks."""
    chunks = cut_into_chunks(x_BLHP, dt_BLH, B_BLGN, C_BLGN, reset, chunk_size)
    decays = compute_decays(chunks.dt_nQH, A_H, chunks.reset_nQ)
    states, final_state = states_entering_chunks(chunks, decays, initial_state)
    if chunks.C_nGQN is None:
        return None, final_state, states
    return join_chunks(output_of_chunks(chunks, decays, states, D), x_BLHP), final_state, states


def output_of_chunks(chunks: Chunks, decays: Decays, states: Tensor, D: Tensor | None) -> Tensor:
    """The outputs of all chunks, `(n, Q, H, P)` in the dtype of `x`, from the states that enter them."""
    y_nQHP = torch.empty_like(chunks.x_nQHP, memory_format=torch.contiguous_format)
    for block in chunks.blocks():
        _output_of_block(chunks, decays, states, D, block, y_nQHP[block])
    return y_nQHP


def join_chunks(value_nQ: Tensor, like_BL: Tensor) -> Tensor:
    """Join chunks to rows of the length and dtype of `like_BL`, without the padding."""
    B, L = like_BL.shape[:2]
    return value_nQ.reshape(B, -1, *value_nQ.shape[2:])[:, :L].to(like_BL.dtype).contiguous()


def states_to_groups(state_BHPN: Tensor | None, like: Tensor, B: int) -> Tensor:
    """Copy `(B, H, P, N)` states, or zeros for None, to `(B, G, N, h, P)` in the dtype of `like`."""
    copy = like.new_zeros(B, *like.shape[1:])
    return copy if state_BHPN is None else copy.copy_(state_BHPN.unflatten(1, (like.shape[1], -1)).movedim(-1, 2))


def states_from_groups(state: Tensor) -> Tensor:
    """Lay out `(B, G, N, h, P)` states as `(B, H, P, N)`, contiguous."""
    return state.movedim(2, -1).flatten(1, 2).contiguous()


def states_entering_chunks(chunks: Chunks, decays: Decays, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the states entering all chunks, `(n, G, N, h, P)`, and the final state `(B, H, P, N)`."""
    n, _, H, P = chunks.x_nQHP.shape
    G, _, N = chunks.B_nGQN.shape[1:]
    states = chunks.B_nGQN.new_empty(n, G, N, H // G, P)
    for block in chunks.blocks():
        weighted = scale_by_group(chunks.x_nQHP[block], chunks.dt_nQH[block] * decays.out_nQH[block], G)
        B_mQN = chunks.B_nGQN[block].flatten(0, 1)
        torch.bmm(B_mQN.mT, weighted, out=states[block].view(-1, N, H // G * P))
    carry = states_to_groups(initial_state, states, chunks.num_rows)
    carry = scan_in_place(states, decays.through_nH, carry, chunks.per_row)
    return states, states_from_groups(carry)


def scan_in_place(states: Tensor, through_nH: Tensor, carry: Tensor, per_row: int, reverse: bool = False) -> Tensor:
    """Replace what each chunk adds by the sum that arrives at it, in order of time or in reverse; return the last sum.

    `states` are `(n, G, N, h, P)`, `carry` is `(B, G, N, h, P)` and is overwritten.
    """
    states = states.unflatten(0, (-1, per_row))
    G, h = states.shape[2], states.shape[4]
    through = through_nH.view(-1, per_row, G, 1, h, 1)
    spare = torch.empty_like(carry)
    for c in reversed(range(per_row)) if reverse else range(per_row):
        torch.addcmul(states[:, c], carry, through[:, c], out=spare)
        states[:, c].copy_(carry)
        carry, spare = spare, carry
    return carry


def _output_of_block(
    chunks: Chunks, decays: Decays, states: Tensor, D: Tensor | None, block: slice, y_nQHP: Tensor
) -> None:
    """Write the outputs of a block of chunks into `y_nQHP`."""
    before = _from_states(chunks, states, block)
    y = working_copy(y_nQHP, before.dtype)
    torch.mul(before, decays.into_nQH[block][..., None], out=y)
    y.addcmul_(_from_chunk(chunks, decays, block), decays.fix_row_nQH[block][..., None])
    if D is not None:
        y.addcmul_(chunks.x_nQHP[block].to(y.dtype), D.to(y.dtype).view(y.shape[2], -1))
    store(y_nQHP, y)


def _from_chunk(chunks: Chunks, decays: Decays, block: slice) -> Tensor:
    """What tokens get from their own chunks, `(n, Q, H, P)`, but for `fix_row`."""
    x_nQHP, dt_nQH = chunks.x_nQHP[block], chunks.dt_nQH[block]
    n, Q, H, P = x_nQHP.shape
    B_mQN, C_mQN = chunks.projections(block)
    G = B_mQN.shape[0] // n
    scores = decay_matrix(decays, block)
    scores.view(n * G, -1, Q, Q).mul_(torch.bmm(C_mQN, B_mQN.mT).mul_(decays.visible(block, G))[:, None])
    within = torch.bmm(scores.view(n * H, Q, Q), scale_by_head(x_nQHP, dt_nQH * decays.fix_col_nQH[block]))
    return within.view(n, H, Q, P).transpose(1, 2)


def _from_states(chunks: Chunks, states: Tensor, block: slice) -> Tensor:
    """What tokens get from the states entering their chunks, `(n, Q, H, P)`, but for the decay on the way."""
    n, _, H, P = chunks.x_nQHP[block].shape
    _, C_mQN = chunks.projections(block)
    G = C_mQN.shape[0] // n
    return group_to_tokens(torch.bmm(C_mQN, states[block].view(n * G, -1, H // G * P)), n, H)


def output_within_chunks(chunks: Chunks, decays: Decays, D: Tensor | None) -> Tensor:
    """What tokens get from their own chunks and from `D x`, `(n, Q, H, P)` in the dtype of sums."""
    y_nQHP = chunks.dt_nQH.new_empty(chunks.x_nQHP.shape)
    for block in chunks.blocks():
        y = torch.mul(_from_chunk(chunks, decays, block), decays.fix_row_nQH[block][..., None], out=y_nQHP[block])
        if D is not None:
            y.addcmul_(chunks.x_nQHP[block].to(y.dtype), D.to(y.dtype).view(y.shape[2], -1))
    return y_nQHP


def add_output_of_states(chunks: Chunks, decays: Decays, states: Tensor, y_nQHP: Tensor) -> None:
    """Add what tokens get from the states entering their chunks."""
    for block in chunks.blocks():
        y_nQHP[block].addcmul_(_from_states(chunks, states, block), decays.into_nQH[block][..., None])


def add_entering_state(
    chunks: Chunks, decays: Decays, states: Tensor, state_BHPN: Tensor | None, *, reverse: bool = False
) -> None:
    """Add to the chunks' states what a state that enters each row leaves at them; in reverse, one from its end."""
    if state_BHPN is None:
        return
    rows, per_row = chunks.num_rows, chunks.per_row
    through = decays.through_nH.unflatten(0, (rows, per_row))
    through = through.flip(1) if reverse else through
    reaching = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1].cumprod(1)], 1)
    reaching = reaching.flip(1) if reverse else reaching
    G, h = states.shape[1], states.shape[3]
    carry = states_to_groups(state_BHPN, states, rows)
    states.unflatten(0, (rows, per_row)).addcmul_(carry[:, None], reaching.view(rows, per_row, G, 1, h, 1))
