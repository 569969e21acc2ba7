"""The fused scan, forward and in reverse: one pass over the inputs, the state carried in registers between chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .decays import FusedDecays, into_decay, out_weight, sees, through_decay, weight_between
from .plan import Plan, row_and_token


def scan_chunks(
    values_BLHP: Tensor,
    reads_BLGN: Tensor,
    writes_BLGN: Tensor,
    D: Tensor | None,
    products: Tensor,
    decays: FusedDecays,
    plan: Plan,
    entering: Tensor | None,
    *,
    reverse: bool,
    keep: bool,
    segments: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scan each of `segments` stretches of chunks from the state that enters it, in one launch.

    Forward, values are x, the state is read by C and written by B, and outputs are y. In reverse, values are dy, the
    state, which is the gradient of the state, is read by B and written by C, and outputs are dx: the same recurrence
    with time turned round. `entering` is `(B, segments, H, P, N)` float32, None for zeros. Returns the outputs, the
    state that leaves the last chunk (in reverse, the first), and, with `keep`, those that enter each span.
    """
    B, L, H, P = values_BLHP.shape
    out_BLHP = torch.empty(B, L, H, P, dtype=values_BLHP.dtype, device=values_BLHP.device)
    last = decays.dt.new_empty(B, H, P, plan.N)
    kept = plan.empty_states(values_BLHP) if keep else None
    launch(
        _ssd_scan_kernel,
        (H * plan.blocks_p, B, segments),
        values_ptr=values_BLHP,
        reads_ptr=reads_BLGN,
        writes_ptr=writes_BLGN,
        D_ptr=None if D is None else D.contiguous(),
        products_ptr=products,
        **decays.pointers(),
        entering_ptr=entering,
        out_ptr=out_BLHP,
        last_ptr=last,
        kept_ptr=kept,
        **row_and_token("values", values_BLHP),
        **row_and_token("reads", reads_BLGN),
        **row_and_token("writes", writes_BLGN),
        length=L,
        segment_chunks=plan.segment_chunks(segments),
        H=H,
        heads_per_group=H // plan.G,
        D_PER_CHANNEL=D is not None and D.dim() == 2,
        REVERSE=reverse,
        BLOCK_N=plan.block_n,
        SLICES=plan.block_n // plan.slice,
        **plan.constants(),
        **plan.options("scan"),
    )
    return out_BLHP, last, kept


def empty_products(B_BLGN: Tensor, plan: Plan) -> Tensor:
    """Room for one product a chunk and group, `(B, C, G, Q, Q)`; float32 for float16, which products may pass."""
    dtype = torch.float32 if B_BLGN.dtype == torch.float16 else B_BLGN.dtype
    return B_BLGN.new_empty(B_BLGN.shape[0], plan.chunks, plan.G, plan.chunk, plan.chunk, dtype=dtype)


def products_of_groups(B_BLGN: Tensor, C_BLGN: Tensor, plan: Plan) -> Tensor:
    """Compute `C B^T` of every chunk, which the heads of a group share, `(B, C, G, Q, Q)` in the dtype of B."""
    B = B_BLGN.shape[0]
    products = empty_products(B_BLGN, plan)
    launch(
        _ssd_products_kernel,
        (plan.chunks, B * plan.G),
        B_ptr=B_BLGN,
        C_ptr=C_BLGN,
        products_ptr=products,
        B_row=B_BLGN.stride(0),
        B_token=B_BLGN.stride(1),
        C_row=C_BLGN.stride(0),
        C_token=C_BLGN.stride(1),
        length=plan.L,
        G=plan.G,
        N=plan.N,
        Q=plan.chunk,
        BLOCK_N=plan.slice,
        PRECISION=plan.precision,
    )
    return products


@triton.jit
def _ssd_products_kernel(
    B_ptr,
    C_ptr,
    products_ptr,
    B_row,
    B_token,
    C_row,
    C_token,
    length,
    G,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c, group, row = tl.program_id(0), tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    start = c.to(tl.int64) * Q
    B_ptr += row * B_row + group * N + start * B_token
    C_ptr += row * C_row + group * N + start * C_token
    products = tl.zeros((Q, Q), tl.float32)
    for first in range(0, N, BLOCK_N):
        inside = (q < length - start)[:, None] & (n[None, :] < N - first)
        keys = tl.load(B_ptr + first + (q[:, None] * B_token + n[None, :]), mask=inside, other=0.0)
        queries = tl.load(C_ptr + first + (q[:, None] * C_token + n[None, :]), mask=inside, other=0.0)
        products += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    products_ptr += ((row * tl.num_programs(0) + c) * G + group) * Q * Q
    tl.store(products_ptr + (q[:, None] * Q + q[None, :]), products.to(products_ptr.dtype.element_ty))


@triton.jit
def _read_state(
    reads_ptr,
    token: tl.constexpr,
    in_chunk,
    state,
    first: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each token of a chunk reads from the columns `first` onwards of a state, in slices.

    One product over all columns would hold all that is read, and the state once more, in registers.
    """
    if SLICES == 1:
        q, n = tl.arange(0, in_chunk.shape[0]), tl.arange(0, state.shape[1]) + first
        at = reads_ptr + (q[:, None] * token + n[None, :])
        reads = tl.load(at, mask=in_chunk & (n[None, :] < N), other=0.0)
        out = tl.dot(reads, tl.trans(state.to(reads.dtype)), input_precision=PRECISION)
    else:
        half: tl.constexpr = state.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(state, (state.shape[0], 2, half)), (0, 2, 1)))
        out = _read_state(reads_ptr, token, in_chunk, left, first, N, SLICES // 2, PRECISION)
        out += _read_state(reads_ptr, token, in_chunk, right, first + half, N, SLICES // 2, PRECISION)
    return out


@triton.jit
def _ssd_scan_kernel(
    values_ptr,
    reads_ptr,
    writes_ptr,
    D_ptr,
    products_ptr,
    log_ptr,
    log_low_ptr,
    from_ptr,
    from_low_ptr,
    start_ptr,
    entering_ptr,
    out_ptr,
    last_ptr,
    kept_ptr,
    values_row,
    values_token: tl.constexpr,
    reads_row,
    reads_token: tl.constexpr,
    writes_row,
    writes_token: tl.constexpr,
    length,
    chunks,
    segment_chunks,
    H: tl.constexpr,
    heads_per_group: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    REVERSE: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads are neighbours in the grid: those of a group read its B and C at about the same time, from cache.
    h, first_p = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK_P
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), first_p + tl.arange(0, BLOCK_P)
    in_state = (p[:, None] < P) & (n[None, :] < N)
    place = p[:, None] * N + n[None, :]
    group = h // heads_per_group
    values_ptr += row * values_row + h * P
    reads_ptr += row * reads_row + group * N
    writes_ptr += row * writes_row + group * N
    of_head = (row * H + h) * chunks * Q
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if entering_ptr is not None:
        of_segment = (row * tl.num_programs(2) + segment) * H + h
        state = tl.load(entering_ptr + of_segment * P * N + place, mask=in_state, other=0.0)
    if D_ptr is not None:
        if D_PER_CHANNEL:
            D = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        else:
            D = tl.load(D_ptr + h).to(tl.float32)
    first = segment * segment_chunks
    end = tl.minimum(first + segment_chunks, chunks)
    for step in range(0, end - first):
        c = first + step
        if REVERSE:
            c = end - 1 - step
        start = c.to(tl.int64) * Q
        at, start_at = of_head + start, row * chunks * Q + start
        if kept_ptr is not None:
            enters_span = c % SPAN == 0
            if REVERSE:
                enters_span = (c % SPAN == SPAN - 1) | (c == chunks - 1)
            if enters_span:
                spans = (chunks + SPAN - 1) // SPAN
                kept = ((row * spans + c // SPAN) * H + h) * P * N
                tl.store(kept_ptr + kept + place, state.to(kept_ptr.dtype.element_ty), mask=in_state)
        in_chunk = (q < length - start)[:, None]
        at_p = in_chunk & (p[None, :] < P)
        values_at = values_ptr + start * values_token + (q[:, None] * values_token + p[None, :])
        values = tl.load(values_at, mask=at_p, other=0.0)
        products_at = products_ptr + ((row * chunks + c) * (H // heads_per_group) + group) * Q * Q
        mixing = tl.load(products_at + (q[:, None] * Q + q[None, :])).to(tl.float32)
        visible = sees(start_ptr, start_at, c, Q)
        mixing *= weight_between(log_ptr, log_low_ptr, from_ptr, from_low_ptr, at, visible, Q)
        mixing = mixing.to(values.dtype)
        into = into_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        leaving = out_weight(log_ptr, log_low_ptr, from_ptr, from_low_ptr, start_ptr, at, start_at, Q)
        if REVERSE:
            mixing, into, leaving = tl.trans(mixing), leaving, into
        # Loaded next to their products: loads further up would keep the whole of both in registers all along.
        reads_at = reads_ptr + start * reads_token
        out = _read_state(reads_at, reads_token, in_chunk, state, 0, N, SLICES, PRECISION)
        out *= into[:, None]
        # A sum, and not one product on top of the other: the compiler would keep the warps of both to one axis.
        out += tl.dot(mixing, values, input_precision=PRECISION)
        if D_ptr is not None:
            out += D * values.to(tl.float32)
        out_at = out_ptr + ((row * length + start) * H + h) * P + (q[:, None] * (H * P) + p[None, :])
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=at_p)
        writes_at = writes_ptr + start * writes_token + (q[:, None] * writes_token + n[None, :])
        writes = tl.load(writes_at, mask=in_chunk & (n[None, :] < N), other=0.0)
        weighted = (values.to(tl.float32) * leaving[:, None]).to(writes.dtype)
        through = through_decay(log_ptr, log_low_ptr, start_ptr, at, start_at, Q)
        state = tl.dot(tl.trans(weighted), writes, state * through, input_precision=PRECISION)
    is_last = end == chunks
    if REVERSE:
        is_last = first == 0
    if is_last:
        tl.store(last_ptr + (row * H + h) * P * N + place, state, mask=in_state)
