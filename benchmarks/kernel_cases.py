"""Calls of every Triton kernel, forward and backward, on tensors of any device: what is compiled, counted and timed.

On the meta device nothing runs: `headrace.kernels.launch.record_launches` then tells what would be launched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class KernelCase:
    """A call of one operator's kernels on tensors of a device and dtype, and where it comes from."""

    name: str
    run: Callable[[str, torch.dtype], None]


def _swiglu(device: str, dtype: torch.dtype) -> None:
    from headrace.kernels.activations.fused import swiglu_backward, swiglu_forward

    gate, up, dout = (random(device, dtype, 8192, 5504) for _ in range(3))
    swiglu_forward(gate, up)
    swiglu_backward(dout, gate, up)


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)


CASES = [KernelCase("swiglu 8192x5504", _swiglu)]
