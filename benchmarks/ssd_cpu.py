"""Time the SSD operator against stock transformers' torch path, forward and backward, on one CPU thread.

    python benchmarks/ssd_cpu.py [--repeats 7] [--shape B L H P G N]

Both get the same random float32 inputs (step sizes already computed) in one process. Runs are interleaved; the table
shows medians of CPU time per call, so that other work on the machine disturbs it little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from headrace.kernels import ssd_scan

STOCK_CHUNK_SIZES = (256, 128, 64, 32)


def make_inputs(shape: tuple[int, int, int, int, int, int]) -> tuple[Tensor, ...]:
    """Return x, dt, A, B, C, D as they are in a freshly initialised Mamba-2 layer, with gradients."""
    B, L, H, P, G, N = shape
    torch.manual_seed(0)
    dt_BLH = torch.exp(torch.empty(B, L, H).uniform_(-6.9, -2.3))
    A_H = -torch.empty(H).uniform_(1, 16)
    tensors = [torch.randn(B, L, H, P), dt_BLH, A_H, torch.randn(B, L, G, N), torch.randn(B, L, G, N), torch.ones(H)]
    return tuple(t.requires_grad_() for t in tensors)


def seconds(run: Callable[[], tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> float:
    """Return the CPU seconds of one forward and backward pass."""
    start = time.process_time()
    y, _ = run()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return time.process_time() - start


def main() -> None:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=6, default=(1, 1024, 24, 64, 1, 128), metavar=tuple("BLHPGN"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(tuple(options.shape))
    *operands, D = inputs
    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"headrace": lambda: ssd_scan(*operands, D)}
    candidates["headrace, states recomputed"] = lambda: ssd_scan(*operands, D, keep_states=False)
    for size in STOCK_CHUNK_SIZES:
        candidates[f"transformers, chunk {size}"] = lambda size=size: mamba2_chunk_scan(
            *operands, chunk_size=size, D=D, return_final_states=True
        )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(options.repeats + 1):
        for name, run in candidates.items():
            elapsed = seconds(run, inputs)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    ours = statistics.median(times["headrace"])
    print(f"SSD forward + backward, float32, one thread, (B, L, H, P, G, N) = {tuple(options.shape)}\n")
    print("| path | CPU ms, median | min | times headrace |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median * 1e3:.1f} | {min(values) * 1e3:.1f} | {median / ours:.1f} |")


if __name__ == "__main__":
    main()
