"""Backward of the chunked SSD path: everything of size `Q x Q` is computed again, block by block.

With M the matrix that maps the inputs of a chunk to its outputs and W = M * dM, the gradient of the logarithm of the
decay at token t is all that flows across t: W[q, j] for j < t <= q, what the entering state gives to tokens q >= t,
what tokens j < t give to the leaving state, and what passes through the whole chunk. Summing these flows instead of
taking the difference of two large sums keeps float32 gradients of dt and A as exact as the recurrence's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import join_chunks, scan_in_place, states_entering_chunks, states_from_groups, states_to_groups
from .layout import (
    Chunks,
    Decays,
    compute_decays,
    cut,
    cut_into_chunks,
    decay_matrix,
    group_to_tokens,
    scale_by_group,
    scale_by_head,
)


class Inputs(NamedTuple):
    """What the forward pass was given; shapes as in `ssd_scan`."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor | None
    D: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None


class Gradients(NamedTuple):
    """Gradients of all chunks, filled in block by block; a `flow` is a gradient of logarithms of decays."""

    x_nQHP: Tensor
    dt_nQH: Tensor
    B_nGQN: Tensor
    C_nGQN: Tensor
    D_HP: Tensor
    flow_in_nQH: Tensor  # crosses every t <= q
    flow_out_nQH: Tensor  # crosses every t > j
    flow_through_nH: Tensor  # crosses every t


def ssd_chunked_backward(
    dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None, inputs: Inputs, states: Tensor | None, chunk_size: int
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `x, dt, A, B, C, D, initial_state`, given those of the output and of the final state.

    `states` are those the forward pass kept, or None to compute them again. The gradients of C and D are None where
    those inputs are.
    """
    x, dt, A_H, B, C, D, initial_state, reset = inputs
    chunks = cut_into_chunks(x, dt, B, C, reset, chunk_size)
    decays = compute_decays(chunks.dt_nQH, A_H, chunks.reset_nQ)
    if states is None:
        states, _ = states_entering_chunks(chunks, decays, initial_state)
    grads = empty_gradients(chunks)
    dy_nQHP = None if dy_BLHP is None else cut(dy_BLHP, chunks.x_nQHP.shape[1])
    dstates = torch.empty_like(states)
    if dy_nQHP is None:
        dstates.zero_()
        grads.C_nGQN.zero_()
    else:
        for block in chunks.blocks():
            through_entering_states(chunks, decays, states, dstates, dy_nQHP[block], block, grads)
    carry = states_to_groups(dfinal_BHPN, states, chunks.num_rows)
    carry = scan_in_place(dstates, decays.through_nH, carry, chunks.per_row, reverse=True)
    for block in chunks.blocks():
        through_leaving_states(chunks, decays, states, dstates, block, grads)
        if dy_nQHP is not None:
            within_chunks(chunks, decays, D, dy_nQHP[block], block, grads)
    ddt_nQH, dA_H = through_decays(chunks, decays, A_H, grads)
    dC = None if C is None else join_chunks(grads.C_nGQN.transpose(1, 2), C)
    dD = None if D is None else (grads.D_HP if D.dim() == 2 else grads.D_HP.sum(1)).to(D.dtype)
    dinitial = states_from_groups(carry).to(carry.dtype if initial_state is None else initial_state.dtype)
    dB = join_chunks(grads.B_nGQN.transpose(1, 2), B)
    return join_chunks(grads.x_nQHP, x), join_chunks(ddt_nQH, dt), dA_H.to(A_H.dtype), dB, dC, dD, dinitial


def empty_gradients(chunks: Chunks) -> Gradients:
    """Gradients to be filled in."""
    like = chunks.dt_nQH
    n, Q, H, P = chunks.x_nQHP.shape
    return Gradients(
        x_nQHP=like.new_empty(n, Q, H, P),
        dt_nQH=torch.empty_like(like),
        B_nGQN=torch.empty_like(chunks.B_nGQN),
        C_nGQN=torch.empty_like(chunks.B_nGQN),
        D_HP=like.new_zeros(H, P),
        flow_in_nQH=torch.zeros_like(like, dtype=torch.float64),
        flow_out_nQH=torch.empty_like(like),
        flow_through_nH=like.new_empty(n, H),
    )


def through_entering_states(
    chunks: Chunks, decays: Decays, states: Tensor, dstates: Tensor, dy_nQHP: Tensor, block: slice, grads: Gradients
) -> None:
    """Fill in what the states entering a block's chunks get from the outputs, and C through them."""
    into_nQH = decays.into_nQH[block]
    n, _, H, _ = dy_nQHP.shape
    _, C_mQN = chunks.projections(block)
    states_mNR = states[block].flatten(3).flatten(0, 1)
    weighted_mQR = scale_by_group(dy_nQHP, into_nQH, states.shape[1])
    torch.bmm(C_mQN.mT, weighted_mQR, out=dstates[block].flatten(3).flatten(0, 1))
    torch.bmm(weighted_mQR, states_mNR.mT, out=grads.C_nGQN[block].flatten(0, 1))
    output = group_to_tokens(torch.bmm(C_mQN, states_mNR), n, H)
    torch.mul(output.mul_(dy_nQHP).sum(-1), into_nQH, out=grads.flow_in_nQH[block])


def through_leaving_states(
    chunks: Chunks,
    decays: Decays,
    states: Tensor,
    dstates: Tensor,
    block: slice,
    grads: Gradients,
    *,
    add: bool = False,
) -> None:
    """Fill in, or `add`, what a block's tokens get from the states leaving their chunks."""
    x_nQHP, dt_nQH, out_nQH = chunks.x_nQHP[block], chunks.dt_nQH[block], decays.out_nQH[block]
    n, _, H, _ = x_nQHP.shape
    weight_nQH = dt_nQH * out_nQH
    dstates_mNR = dstates[block].flatten(3).flatten(0, 1)
    weighted_mQR = scale_by_group(x_nQHP, weight_nQH, dstates.shape[1])
    dB_mQN = grads.B_nGQN[block].flatten(0, 1)
    torch.baddbmm(dB_mQN, weighted_mQR, dstates_mNR.mT, beta=int(add), out=dB_mQN)
    dinflow = group_to_tokens(torch.bmm(chunks.B_nGQN[block].flatten(0, 1), dstates_mNR), n, H)
    dx_nQHP, ddt_nQH = grads.x_nQHP[block], grads.dt_nQH[block]
    if add:
        dx_nQHP.addcmul_(dinflow, weight_nQH[..., None])
    else:
        torch.mul(dinflow, weight_nQH[..., None], out=dx_nQHP)
    along_x_nQH = dinflow.mul_(x_nQHP).sum(-1)
    if add:
        ddt_nQH.addcmul_(along_x_nQH, out_nQH)
    else:
        torch.mul(along_x_nQH, out_nQH, out=ddt_nQH)
    torch.mul(along_x_nQH, weight_nQH, out=grads.flow_out_nQH[block])
    kept_nH = (states[block] * dstates[block]).sum((2, 4)).flatten(1)
    torch.mul(kept_nH, decays.through_nH[block], out=grads.flow_through_nH[block])


def within_chunks(
    chunks: Chunks, decays: Decays, D: Tensor | None, dy_nQHP: Tensor, block: slice, grads: Gradients
) -> None:
    """Add what a block's tokens get from the outputs of their own chunks."""
    x_nQHP, dt_nQH = chunks.x_nQHP[block], chunks.dt_nQH[block]
    n, Q, H, P = x_nQHP.shape
    B_mQN, C_mQN = chunks.projections(block)
    G = B_mQN.shape[0] // n
    column_nQH = dt_nQH * decays.fix_col_nQH[block]
    dy_rQP = scale_by_head(dy_nQHP, decays.fix_row_nQH[block])
    visible = decays.visible(block, G)
    products_mhQQ = torch.bmm(C_mQN, B_mQN.mT).mul_(visible)[:, None]
    decay_mhQQ = decay_matrix(decays, block).view(n * G, -1, Q, Q)
    dscores = torch.bmm(dy_rQP, scale_by_head(x_nQHP, column_nQH).mT).view_as(decay_mhQQ).mul_(decay_mhQQ)
    dproducts_mQQ = dscores.sum(1).mul_(visible)
    grads.C_nGQN[block].flatten(0, 1).baddbmm_(dproducts_mQQ, B_mQN)
    grads.B_nGQN[block].flatten(0, 1).baddbmm_(dproducts_mQQ.mT, C_mQN)
    # float64: the sums over rows and over columns nearly cancel where decays are fast
    flow = dscores.mul_(products_mhQQ).view(n, H, Q, Q).double()
    grads.flow_in_nQH[block].add_((flow.sum(-1) - flow.sum(-2)).transpose(1, 2))

    dinflow = torch.bmm(decay_mhQQ.mul_(products_mhQQ).view(n * H, Q, Q).mT, dy_rQP)
    dinflow = dinflow.view(n, H, Q, P).transpose(1, 2)
    dx_nQHP = grads.x_nQHP[block].addcmul_(dinflow, column_nQH[..., None])
    grads.dt_nQH[block].addcmul_(dinflow.mul_(x_nQHP).sum(-1), decays.fix_col_nQH[block])
    if D is not None:
        dy_nQHP = dy_nQHP.to(dx_nQHP.dtype)
        dx_nQHP.addcmul_(dy_nQHP, D.to(dx_nQHP.dtype).view(H, -1))
        grads.D_HP.add_((dy_nQHP * x_nQHP).sum((0, 1)))


def through_decays(chunks: Chunks, decays: Decays, A_H: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
    """Turn flows into gradients of step sizes, `(n, Q, H)`, and of `A`, float64 until the last step."""
    dlog_nQH = decays.sees_nQQ.mT @ grads.flow_in_nQH
    dlog_nQH += decays.sees_nQQ.tril(-1) @ grads.flow_out_nQH.double()
    dlog_nQH += grads.flow_through_nH.double()[:, None]
    dA_H = (dlog_nQH * chunks.dt_nQH).sum((0, 1))
    return grads.dt_nQH + (dlog_nQH * A_H).to(grads.dt_nQH.dtype), dA_H
