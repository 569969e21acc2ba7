"""Time the SSD operator against stock transformers' torch path, forward and backward, on one CPU thread.

    python benchmarks/ssd_cpu.py [--rounds 7] [--shape B L H P G N]

Both get, in one process, the float32 inputs that a freshly initialised stock layer gives its scan for random hidden
states, step sizes already computed. A round runs every candidate once
with the matrix products torch picks by itself (MKL's on x86), and once with those headrace's runs ask for (oneDNN's,
where `kernels.products.prefer_onednn` finds them exact). The table shows medians of CPU time over the rounds, so that
other work on the machine disturbs it little; the last column is transformers as its users
have it against headrace as its runs have it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from headrace.kernels import ssd_scan
from headrace.kernels.products import prefer_onednn

STOCK_CHUNK_SIZES = (256, 128, 64, 32)


def make_inputs(shape: tuple[int, int, int, int, int, int]) -> tuple[Tensor, ...]:
    """Return what a freshly initialised stock layer hands to its scan for random inputs: x, dt, A, B, C, D."""
    B, L, H, P, G, N = shape
    torch.manual_seed(0)
    config = modeling_mamba2.Mamba2Config(
        hidden_size=H * P // 2, num_heads=H, head_dim=P, n_groups=G, state_size=N, num_hidden_layers=1
    )
    mixer = modeling_mamba2.Mamba2ForCausalLM(config).backbone.layers[0].mixer
    seen: dict[str, Any] = {}

    def record(*operands: Tensor, dt_bias: Tensor, D: Tensor, **options: Any) -> Tensor:
        x_BLHP, dt_BLH, *others = operands
        seen["tensors"] = (x_BLHP, torch.nn.functional.softplus(dt_BLH + dt_bias), *others, D)
        return x_BLHP

    with mock.patch.object(modeling_mamba2, "mamba2_chunk_scan", record):
        mixer(torch.randn(B, L, H * P // 2))
    return tuple(t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in seen["tensors"])


def seconds(run: Callable[[], tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> float:
    """Return the CPU seconds of one forward and backward pass."""
    start = time.process_time()
    y, _ = run()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return time.process_time() - start


def measure(
    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]], inputs: tuple[Tensor, ...], rounds: int
) -> dict[tuple[str, bool], float]:
    """Return the median CPU seconds of every candidate, without and with the products headrace asks for."""
    matmul = torch.backends.mkldnn.matmul
    stock_precision = matmul.fp32_precision
    times: dict[tuple[str, bool], list[float]] = {(name, own): [] for own in (False, True) for name in candidates}
    for number in range(rounds + 1):
        for (name, own), values in times.items():
            matmul.fp32_precision = stock_precision
            if own:
                prefer_onednn()
            elapsed = seconds(candidates[name], inputs)
            if number:  # the first round warms up
                values.append(elapsed)
    matmul.fp32_precision = stock_precision
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=6, default=(1, 1024, 24, 64, 1, 128), metavar=tuple("BLHPGN"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(tuple(options.shape))
    *operands, D = inputs
    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "headrace": lambda: ssd_scan(*operands, D),
        "headrace, states recomputed": lambda: ssd_scan(*operands, D, keep_states=False),
    }
    for size in STOCK_CHUNK_SIZES:
        candidates[f"transformers, chunk {size}"] = lambda size=size: modeling_mamba2.mamba2_chunk_scan(
            *operands, chunk_size=size, D=D, return_final_states=True
        )
    medians = measure(candidates, inputs, options.rounds)
    print(f"SSD forward + backward, float32, one thread, (B, L, H, P, G, N) = {tuple(options.shape)}\n")
    print("| path | stock products, CPU ms | times headrace | oneDNN products, CPU ms | times headrace | as used |")
    print("| --- " + "| ---: " * 5 + "|")
    for name in candidates:
        stock, own = medians[name, False], medians[name, True]
        ratios = (
            stock / medians["headrace", False],
            own / medians["headrace", True],
            stock / medians["headrace", True],
        )
        print(f"| {name} | {stock * 1e3:.1f} | {ratios[0]:.1f} | {own * 1e3:.1f} | {ratios[1]:.1f} | {ratios[2]:.1f} |")


if __name__ == "__main__":
    main()
