"""SwiGLU on a GPU: one pass forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch
from ..tiles import tile


def swiglu_forward(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    """Return `silu(gate) * up`; arguments as in `swiglu`, contiguous."""
    out_TD = torch.empty_like(gate_TD)
    choice = tile("swiglu", architecture(gate_TD))
    launch(
        _swiglu_forward_kernel,
        (triton.cdiv(gate_TD.numel(), choice["block"]),),
        gate_ptr=gate_TD,
        up_ptr=up_TD,
        out_ptr=out_TD,
        size=gate_TD.numel(),
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )
    return out_TD


def swiglu_backward(dout_TD: Tensor, gate_TD: Tensor, up_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up`."""
    dgate_TD, dup_TD = torch.empty_like(gate_TD), torch.empty_like(up_TD)
    choice = tile("swiglu", architecture(gate_TD))
    launch(
        _swiglu_backward_kernel,
        (triton.cdiv(gate_TD.numel(), choice["block"]),),
        dout_ptr=dout_TD,
        gate_ptr=gate_TD,
        up_ptr=up_TD,
        dgate_ptr=dgate_TD,
        dup_ptr=dup_TD,
        size=gate_TD.numel(),
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
    )
    return dgate_TD, dup_TD


@triton.jit
def _swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    dout = tl.load(dout_ptr + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    tl.store(dgate_ptr + i, dout * up * open_ * (1 + gate * (1 - open_)), mask=inside)
    tl.store(dup_ptr + i, dout * gate * open_, mask=inside)
