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


def _cross_entropy(T: int, D: int, V: int) -> Callable[[str, torch.dtype], None]:
    """A head of V rows: with gradients, without, and as the middle one of three shares."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.losses.chunked import linear_cross_entropy_forward
        from headrace.kernels.losses.fused import scale
        from headrace.kernels.losses.operator import tokens_at_a_time
        from headrace.kernels.losses.rows import HeadShard

        x, weight = random(device, dtype, T, D), random(device, dtype, V, D)
        target = torch.randint(V, (T,), device=device)
        options = (-100, tokens_at_a_time(x, V), 1e-4)
        loss, _, dx, _ = linear_cross_entropy_forward(x, weight, target, *options, True, True, fused=True)
        scale(dx, loss)
        linear_cross_entropy_forward(x, weight, target, *options, False, False, fused=True)
        shard = HeadShard(V, 3 * V, combine=lambda sums: sums)
        linear_cross_entropy_forward(x, weight, target, *options, True, True, shard=shard, fused=True)

    return run


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)


CASES = [
    KernelCase("swiglu 8192x5504", _swiglu),
    KernelCase("linear_cross_entropy 8192x2048 V50280", _cross_entropy(8192, 2048, 50280)),
    KernelCase("linear_cross_entropy 8192x512 V1024", _cross_entropy(8192, 512, 1024)),
]
