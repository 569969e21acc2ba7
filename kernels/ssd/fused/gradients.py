"""Gradients that need both states and their gradients: of B, C, step sizes, A and D. One program a chunk and group.

With M what maps a chunk's inputs to its outputs and W = M * dM, the gradient of the logarithm of the decay at token t
is all that flows across t: W[q, j] for j < t <= q, what the entering state gives to tokens q >= t, what tokens j < t
give to the leaving state, and what passes through the whole chunk (`kernels/ssd/chunked_backward.py`). The heads of a
group follow each other in one program, and their gradients of B and C are summed in registers, in order.

States are kept once a span. A program needs the state entering its chunk and the gradient of the one leaving it: from
those at the two ends of the span it takes `SPAN - 1` steps, forward for the chunks before its own, back for those
after. Columns of the state are split over programs, whose shares of what is summed over columns are added at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .decays import FusedDecays, into_decay, out_weight, sees, through_decay, weight_between
from .flows import empty_flows, through_fused_decays
from .plan import Plan, row_and_token


class ParameterGradients(NamedTuple):
    """Gradients in the dtypes of their inputs; those of C and D are None without them."""

    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor | None
    D: Tensor | None


def scan_gradients(
    dy_BLHP: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None,
    products: Tensor,
    decays: FusedDecays,
    plan: Plan,
    states: Tensor,
    dstates: Tensor,
) -> ParameterGradients:
    """Compute the gradients from `states` entering spans and `dstates` leaving them, in up to four launches."""
    B, L, H = dt_BLH.shape
    dtype = B_BLGN.dtype if plan.splits == 1 else torch.float32
    dB, dC = (B_BLGN.new_empty(plan.splits, B, L, plan.G, plan.N, dtype=dtype) for _ in range(2))
    flows = empty_flows(decays, plan.column_blocks)
    width = 1 if D is None else 1 + D.numel() // H
    dheads = flows.new_empty(plan.column_blocks * B * plan.chunks, H, width)
    launch(
        _ssd_gradients_kernel,
        (plan.chunks * plan.column_blocks, B * plan.G, plan.splits),
        dy_ptr=dy_BLHP,
        x_ptr=x_BLHP,
        B_ptr=B_BLGN,
        C_ptr=C_BLGN,
        products_ptr=products,
        dt_ptr=decays.dt,
        **decays.pointers(),
        states_ptr=states,
        dstates_ptr=dstates,
        flows_ptr=flows,
        dB_ptr=dB,
        dC_ptr=dC,
        dheads_ptr=dheads,
        **row_and_token("x", x_BLHP),
        **row_and_token("B", B_BLGN),
        **row_and_token("C", C_BLGN),
        batch=B,
        length=L,
        H=H,
        G=plan.G,
        split_heads=triton.cdiv(H // plan.G, plan.splits),
        D_WIDTH=width - 1,
        BLOCKS_P=triton.cdiv(plan.P, plan.gradients_p),
        BLOCK_N=plan.column_block,
        BLOCKS_N=plan.column_blocks,
        # Whole products, and not three of halves: these tiles are small, and halves would not fit into registers.
        **plan.constants() | {"PRECISION": "ieee", "BLOCK_P": plan.gradients_p},
        **plan.options("gradients"),
    )
    dB, dC = (dB[0], dC[0]) if plan.splits == 1 else _sum_splits(dB, dC, B_BLGN.dtype)
    ddt = through_fused_decays(flows, dheads, decays, dt_BLH, A_H, plan.chunk)
    dheads = dheads.sum(0)
    dD = None if D is None else dheads[:, 1:].reshape(D.shape).to(D.dtype, copy=True)
    return ParameterGradients(ddt, dheads[:, 0].to(A_H.dtype, copy=True), dB, dC, dD)


def _sum_splits(dB: Tensor, dC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum both over the first dim in order, in float32, in one launch."""
    total_B, total_C = (torch.empty(dB.shape[1:], dtype=dtype, device=dB.device) for _ in range(2))
    launch(
        _ssd_sum_splits_kernel,
        (triton.cdiv(total_B.numel(), 1024), 2),
        B_ptr=dB,
        C_ptr=dC,
        total_B_ptr=total_B,
        total_C_ptr=total_C,
        size=total_B.numel(),
        splits=dB.shape[0],
        BLOCK=1024,
    )
    return total_B, total_C


@triton.jit
def _ssd_sum_splits_kernel(B_ptr, C_ptr, total_B_ptr, total_C_ptr, size, splits, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 1:
        B_ptr, total_B_ptr = C_ptr, total_C_ptr
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        total += tl.load(B_ptr + i, mask=i < size, other=0.0)
        B_ptr += size
    tl.store(total_B_ptr + i, total.to(total_B_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _ssd_gradients_kernel(
    dy_ptr,
    x_ptr,
    B_ptr,
    C_ptr,
    products_ptr,
    dt_ptr,
    log_ptr,
    log_low_ptr,
    from_ptr,
    from_low_ptr,
    start_ptr,
    states_ptr,
    dstates_ptr,
    flows_ptr,
    dB_ptr,
    dC_ptr,
    dheads_ptr,
    x_row,
    x_token: tl.constexpr,
    B_row,
    B_token: tl.constexpr,
    C_row,
    C_token: tl.constexpr,
    batch,
    length,
    chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    split_heads,
    P: tl.constexpr,
    N: tl.constexpr,
    D_WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Column blocks of a chunk, and chunks, are neighbours in the grid: they read the same inputs, and those of a span
    # the same states, at about the same time, from cache.
    c, columns = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    group, split, row = tl.program_id(1) % G, tl.program_id(2), (tl.program_id(1) // G).to(tl.int64)
    q, n, p0 = tl.arange(0, Q), columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    span, before = c // SPAN, c % SPAN
    after = tl.minimum(SPAN - 1 - before, chunks - 1 - c)
    spans = (chunks + SPAN - 1) // SPAN
    start = c.to(tl.int64) * Q
    in_chunk = (q < length - start)[:, None]
    start_at = row * chunks * Q + start
    x_ptr += row * x_row
    B_ptr += row * B_row + group * N
    C_ptr += row * C_row + group * N
    in_n = (n < N)[None, :]
    at_n = in_chunk & in_n
    products_ptr += ((row * chunks + c) * G + group) * Q * Q
    dB, dC = tl.zeros((Q, BLOCK_N), tl.float32), tl.zeros((Q, BLOCK_N), tl.float32)
    dproducts = tl.zeros((Q, Q), tl.float32)
    # Sums of flows nearly cancel where decays are fast: float64 where inputs are float32.
    wide = flows_ptr.dtype.element_ty
    first_head = split * split_heads
    last_head = tl.minimum(first_head + split_heads, H // G)
    for head in range(0, last_head - first_head):
        h = group * (H // G) + first_head + head
        of_head = (row * H + h) * chunks * Q
        at = of_head + start
        of_sums = (((columns * batch + row) * chunks + c) * H + h) * (1 + D_WIDTH)
        x_at = x_ptr + start * x_token + h * P
        dy_at = dy_ptr + ((row * length + start) * H + h) * P

        # Between the tokens of the chunk.
        dmixing = tl.zeros((Q, Q), tl.float32)
        for block in range(0, BLOCKS_P):
            p = block * BLOCK_P + p0
            at_p = in_chunk & (p < P)[None, :]
            x = tl.load(x_at + (q[:, None] * x_token + p[None, :]), mask=at_p, other=0.0)
            dy = tl.load(dy_at + (q[:, None] * (H * P) + p[None, :]), mask=at_p, other=0.0)
            dmixing += tl.dot(dy, tl.trans(x), input_precision=PRECISION)
            if D_WIDTH > 1:
                dD = tl.sum(x.to(tl.float32) * dy.to(tl.float32), 0)
                tl.store(dheads_ptr + of_sums + 1 + p, tl.where(columns == 0, dD, 0.0), mask=p < P)
        if D_WIDTH == 1:
            head_dD = tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], dmixing, 0.0), 1), 0)
            tl.store(dheads_ptr + of_sums + 1, tl.where(columns == 0, head_dD, 0.0))
        # Decays without step sizes, whose gradient is wanted apart: `log` stands in for `from`.
        visible = sees(start_ptr, start_at, h, Q)
        dmixing *= weight_between(log_ptr, log_low_ptr, log_ptr, log_low_ptr, at, visible, Q)
        dt = tl.load(dt_ptr + at + q)
        dproducts += dmixing * dt[None, :]
        flow = dmixing * tl.load(products_ptr + (q[:, None] * Q + q[None, :])).to(tl.float32)
        flow = flow.to(wide)
        # What flows within the chunk counts once, with the first columns.
        arriving = tl.sum(flow * dt[None, :], 1) * (columns == 0)
        flows_at = flows_ptr + ((columns * 2 * batch + row) * H + h) * chunks * Q + start
        plane = (row * 0 + batch) * H * chunks * Q
        leaving_at = flows_ptr + ((BLOCKS_N * 2 * batch + row) * H + h) * chunks * Q + start
        tl.store(leaving_at + q, tl.sum(flow, 0), mask=q < tl.where(columns == 0, Q, 0))

        # From the entering state, and to the leaving one.
        into = into_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        out = out_weight(log_ptr, log_low_ptr, log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        leaving = tl.zeros((Q,), wide)
        through = tl.sum(leaving)
        for block in range(0, BLOCKS_P):
            p = block * BLOCK_P + p0
            in_p = (p < P)[None, :]
            at_p = in_chunk & in_p
            in_state, place = (n[:, None] < N) & in_p, n[:, None] + p[None, :] * N
            of_state = ((row * spans + span) * H + h) * P * N
            state = tl.load(states_ptr + of_state + place, mask=in_state, other=0.0).to(tl.float32)
            for k in range(0, before):
                other = start - (before - k) * Q
                k_at, k_start_at = of_head + other, row * chunks * Q + other
                k_x = tl.load(
                    x_ptr + other * x_token + h * P + (q[:, None] * x_token + p[None, :]), mask=in_p, other=0.0
                )
                k_keys = tl.load(B_ptr + other * B_token + (q[:, None] * B_token + n[None, :]), mask=in_n, other=0.0)
                weight = out_weight(log_ptr, log_low_ptr, from_ptr, from_low_ptr, start_ptr, k_at, k_start_at, Q)
                weighted = (k_x.to(tl.float32) * weight[:, None]).to(k_keys.dtype)
                state *= through_decay(log_ptr, log_low_ptr, start_ptr, k_at, k_start_at, Q)
                state = tl.dot(tl.trans(k_keys), weighted, state, input_precision=PRECISION)
            dstate = tl.load(dstates_ptr + of_state + place, mask=in_state, other=0.0).to(tl.float32)
            for k in range(0, after):
                other = start + (after - k) * Q
                k_at, k_start_at = of_head + other, row * chunks * Q + other
                k_in = (q < length - other)[:, None]
                k_dy = dy_ptr + ((row * length + other) * H + h) * P + (q[:, None] * (H * P) + p[None, :])
                k_dy = tl.load(k_dy, mask=k_in & in_p, other=0.0)
                k_queries = C_ptr + other * C_token + (q[:, None] * C_token + n[None, :])
                k_queries = tl.load(k_queries, mask=k_in & in_n, other=0.0)
                weight = into_decay(log_ptr, log_low_ptr, start_ptr, k_at, k_start_at, Q)
                weighted = (k_dy.to(tl.float32) * weight[:, None]).to(k_queries.dtype)
                dstate *= through_decay(log_ptr, log_low_ptr, start_ptr, k_at, k_start_at, Q)
                dstate = tl.dot(tl.trans(k_queries), weighted, dstate, input_precision=PRECISION)
            through += tl.sum(state.to(wide) * dstate.to(wide))
            # B and C are loaded again for each head: in float32 they would stay in registers all along.
            dy = tl.load(dy_at + (q[:, None] * (H * P) + p[None, :]), mask=at_p, other=0.0)
            weighted = (dy.to(tl.float32) * into[:, None]).to(dy.dtype)
            dC_head = tl.dot(weighted, tl.trans(state.to(dy.dtype)), input_precision=PRECISION)
            queries = tl.load(C_ptr + start * C_token + (q[:, None] * C_token + n[None, :]), mask=at_n, other=0.0)
            arriving += tl.sum(dC_head.to(wide) * queries.to(wide), 1)
            dC += dC_head
            x = tl.load(x_at + (q[:, None] * x_token + p[None, :]), mask=at_p, other=0.0)
            weighted = (x.to(tl.float32) * out[:, None]).to(x.dtype)
            dB_head = tl.dot(weighted, tl.trans(dstate.to(x.dtype)), input_precision=PRECISION)
            keys = tl.load(B_ptr + start * B_token + (q[:, None] * B_token + n[None, :]), mask=at_n, other=0.0)
            leaving += tl.sum(dB_head.to(wide) * keys.to(wide), 1)
            dB += dB_head * dt[:, None]
        tl.store(flows_at + q, arriving)
        tl.store(flows_at + plane + q, leaving)
        tl.store(dheads_ptr + of_sums, through)
    keys = tl.load(B_ptr + start * B_token + (q[:, None] * B_token + n[None, :]), mask=at_n, other=0.0)
    queries = tl.load(C_ptr + start * C_token + (q[:, None] * C_token + n[None, :]), mask=at_n, other=0.0)
    dproducts = dproducts.to(keys.dtype)
    dB += tl.dot(tl.trans(dproducts), queries, input_precision=PRECISION)
    dC += tl.dot(dproducts, keys, input_precision=PRECISION)
    of_group = (((split * batch + row) * length + start) * G + group) * N
    in_group = q[:, None] * (G * N) + n[None, :]
    tl.store(dB_ptr + of_group + in_group, dB.to(dB_ptr.dtype.element_ty), mask=at_n)
    tl.store(dC_ptr + of_group + in_group, dC.to(dC_ptr.dtype.element_ty), mask=at_n)
