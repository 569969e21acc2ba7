"""Gated activations as operators with their own backward: the activation is computed again, not kept."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import blocks, compute_dtype, store, working_copy
from .reference import swiglu_reference


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute `silu(gate) * up` (Shazeer 2020, arXiv 2002.05202, equation 6).

    `gate` and `up` have one shape `(..., D)` and one dtype: float64, float32, bfloat16 or float16 (computed in
    float32). Keeps only its inputs for the backward pass. `backend` as in `kernels.dispatch`. Raises ValueError when
    shapes or dtypes differ, or the backend cannot run.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ; give equal shapes")
    if gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} and up is {up.dtype}; give one dtype")
    backend = choose_backend("swiglu", backend, gate)
    if backend == "reference":
        return swiglu_reference(gate, up)
    D = gate.shape[-1]
    return _swiglu(gate.reshape(-1, D), up.reshape(-1, D), backend == "triton").view(gate.shape)


@torch.library.custom_op("headrace::swiglu", mutates_args=())
def _swiglu(gate_TD: Tensor, up_TD: Tensor, fused: bool) -> Tensor:
    if fused:
        from .fused import swiglu_forward

        return swiglu_forward(gate_TD.contiguous(), up_TD.contiguous())
    dtype = compute_dtype(gate_TD)
    out_TD = torch.empty_like(gate_TD, memory_format=torch.contiguous_format)
    for block in blocks(*gate_TD.shape):
        out = working_copy(out_TD[block], dtype)
        torch.ops.aten.silu.out(gate_TD[block].to(dtype), out=out).mul_(up_TD[block])
        store(out_TD[block], out)
    return out_TD


@_swiglu.register_fake
def _(gate_TD: Tensor, up_TD: Tensor, fused: bool) -> Tensor:
    return gate_TD.new_empty(gate_TD.shape)


@torch.library.custom_op("headrace::swiglu_backward", mutates_args=())
def _swiglu_backward(dout_TD: Tensor, gate_TD: Tensor, up_TD: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    if fused:
        from .fused import swiglu_backward

        return swiglu_backward(dout_TD.contiguous(), gate_TD.contiguous(), up_TD.contiguous())
    dtype = compute_dtype(gate_TD)
    dgate_TD = torch.empty_like(gate_TD, memory_format=torch.contiguous_format)
    dup_TD = torch.empty_like(up_TD, memory_format=torch.contiguous_format)
    for block in blocks(*gate_TD.shape):
        gate, dout = gate_TD[block].to(dtype), dout_TD[block].to(dtype)
        dup, dgate = working_copy(dup_TD[block], dtype), working_copy(dgate_TD[block], dtype)
        torch.ops.aten.silu.out(gate, out=dup).mul_(dout)
        torch.mul(dout, up_TD[block], out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        store(dup_TD[block], dup)
        store(dgate_TD[block], dgate)
    return dgate_TD, dup_TD


@_swiglu_backward.register_fake
def _(dout_TD: Tensor, gate_TD: Tensor, up_TD: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return gate_TD.new_empty(gate_TD.shape), up_TD.new_empty(up_TD.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.fused = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_swiglu_backward(dout_TD, *ctx.saved_tensors, ctx.fused), None


_swiglu.register_autograd(_backward, setup_context=_setup_context)
