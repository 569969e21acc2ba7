"""From what flows along decays to the gradients of step sizes and of A: the mirror of `decays.py`.

The gradient of the logarithm of the decay at token t is what flows across t: from outputs q >= t back into the past,
less what stays between tokens on one side, from tokens j < t into the leaving state, and through the whole chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .decays import FusedDecays, add_within_document


def empty_flows(decays: FusedDecays, parts: int) -> Tensor:
    """Room for flows, `(2 parts + 1, B, H, C * Q)`: for each part those that arrive at outputs and those that leave to
    states, and at the end those that leave to the outputs of the same chunk.

    Those that leave are without step sizes. float64 where inputs are float32: arriving and leaving nearly cancel.
    """
    dtype = torch.float32 if decays.log_low is None else torch.float64
    return decays.dt.new_empty(2 * parts + 1, *decays.dt.shape, dtype=dtype)


def through_fused_decays(
    flows: Tensor, dheads: Tensor, decays: FusedDecays, dt_BLH: Tensor, A_H: Tensor, chunk: int
) -> Tensor:
    """Return the gradient of `dt` in its dtype, in one launch; `dheads[..., 0]` turns from flow through to part of dA.

    `dheads` is `(parts * B * C, H, width)`: where a part's flow through a chunk stands, its part of the gradient of A
    is written, all of it with the first part.
    """
    B, L, H = dt_BLH.shape
    ddt = torch.empty(B, L, H, dtype=dt_BLH.dtype, device=dt_BLH.device)
    block = min(16, triton.next_power_of_2(H))
    chunks = triton.cdiv(L, chunk)
    launch(
        _ssd_flows_kernel,
        (chunks, B, triton.cdiv(H, block)),
        flows_ptr=flows,
        dheads_ptr=dheads,
        dt_ptr=decays.dt,
        log_ptr=decays.log,
        log_low_ptr=decays.log_low,
        start_ptr=decays.start,
        A_ptr=A_H.contiguous(),
        ddt_ptr=ddt,
        batch=B,
        length=L,
        H=H,
        width=dheads.shape[2],
        PARTS=flows.shape[0] // 2,
        Q=chunk,
        BLOCK_H=block,
    )
    return ddt


@triton.jit
def _ssd_flows_kernel(
    flows_ptr,
    dheads_ptr,
    dt_ptr,
    log_ptr,
    log_low_ptr,
    start_ptr,
    A_ptr,
    ddt_ptr,
    batch,
    length,
    H,
    width,
    PARTS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    q, h = tl.arange(0, Q), tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = h[None, :] < H
    start = c.to(tl.int64) * Q
    padded = chunks.to(tl.int64) * Q
    at = (row * H + h[None, :]) * padded + start + q[:, None]
    dtype = flows_ptr.dtype.element_ty
    arriving = tl.zeros((Q, BLOCK_H), dtype)
    to_states, before = tl.zeros((Q, BLOCK_H), dtype), tl.zeros((Q, BLOCK_H), dtype)
    through = tl.zeros((BLOCK_H,), dtype)
    of_sums = ((row * chunks + c) * H + h) * width
    plane = batch * H * padded
    heads_plane = (row * 0 + batch) * chunks * H * width  # 64-bit
    # Those of the token before, for the sums over earlier tokens, which leave out the token itself.
    has_before, starts, ends = q > 0, q == 0, q == Q - 1
    if start_ptr is not None:
        document = tl.load(start_ptr + row * padded + start + q)
        starts = starts | (document == q)
        has_before = has_before & (document != q)
        next_document = tl.load(start_ptr + row * padded + start + q + 1, mask=q < Q - 1, other=0)
        ends = ends | (next_document != document)
    for part in tl.static_range(PARTS):
        flows_at = flows_ptr + part * 2 * plane + at
        arriving += tl.load(flows_at, mask=in_heads, other=0.0)
        to_states += tl.load(flows_at + plane, mask=in_heads, other=0.0)
        before += tl.load(flows_at + plane - 1, mask=in_heads & has_before[:, None], other=0.0)
        through += tl.load(dheads_ptr + part * heads_plane + of_sums, mask=h < H, other=0.0)
    leaving = tl.load(flows_ptr + PARTS * 2 * plane + at, mask=in_heads, other=0.0)
    log_at = log_ptr + (row * H + h) * padded + start + Q - 1
    decay = tl.exp2(tl.load(log_at, mask=h < H, other=0.0))
    if log_low_ptr is not None:
        log_at = log_low_ptr + (row * H + h) * padded + start + Q - 1
        decay *= tl.exp2(tl.load(log_at, mask=h < H, other=0.0))
    if start_ptr is not None:
        decay = tl.where(tl.load(start_ptr + row * padded + start + Q - 1) < 0, decay, 0.0)
    dt = tl.load(dt_ptr + at, mask=in_heads, other=0.0)
    dt_before = tl.load(dt_ptr + at - 1, mask=in_heads & has_before[:, None], other=0.0)
    flags = tl.zeros((Q, BLOCK_H), tl.int32)
    later, _ = tl.associative_scan(
        (arriving - leaving * dt, flags + ends.to(tl.int32)[:, None]), 0, add_within_document, reverse=True
    )
    earlier, _ = tl.associative_scan((before * dt_before, flags + starts.to(tl.int32)[:, None]), 0, add_within_document)
    dlog = later + earlier + (through * decay)[None, :]
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(dtype)
    ddt = leaving + to_states + dlog * A[None, :]
    ddt_at = ddt_ptr + (row * length + start + q[:, None]) * H + h[None, :]
    tl.store(ddt_at, ddt.to(ddt_ptr.dtype.element_ty), mask=in_heads & (q < length - start)[:, None])
    dA = tl.sum(dlog * dt, 0)
    tl.debug_barrier()  # before what all threads of the program have read is written over
    for part in tl.static_range(PARTS):
        tl.store(dheads_ptr + part * heads_plane + of_sums, dA, mask=h < H)
        dA = tl.zeros((BLOCK_H,), dtype)
