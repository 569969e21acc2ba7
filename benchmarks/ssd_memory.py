"""Measure the memory of the SSD operator's forward and backward over the sequence length, on the CPU.

    python benchmarks/ssd_memory.py [--lengths 1024 2048 ...] [--shape H P G N]

Each length runs in a process of its own; the figure is how far forward and backward raise the peak resident memory
above what inputs, output gradient and libraries take. For comparison, the table shows what one tensor with all pairs
of tokens within chunks of 64, for all heads, would take.
"""

import argparse
import resource
import subprocess
import sys

import torch
from headrace.kernels import ssd_scan

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MIB = 1 << 20


def peak_rise_mib(L: int, H: int, P: int, G: int, N: int, keep_states: bool) -> float:
    """Return by how many MiB one forward and backward pass raises this process's peak resident memory."""
    torch.set_num_threads(1)

    def run(L: int) -> int:
        tensors = [torch.randn(1, L, H, P), torch.rand(1, L, H) * 0.1, -torch.rand(H) - 1]
        tensors += [torch.randn(1, L, G, N), torch.randn(1, L, G, N), torch.ones(H)]
        inputs = [t.requires_grad_() for t in tensors]
        dy_BLHP = torch.randn(1, L, H, P)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        y, _ = ssd_scan(*inputs, keep_states=keep_states)
        torch.autograd.grad(y, inputs, dy_BLHP)
        return before

    run(64)  # loads libraries
    before = run(L)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB


def main() -> None:
    """Print a table, or one figure when called for a single length by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shape", type=int, nargs=4, default=(24, 64, 1, 128), metavar=tuple("HPGN"))
    parser.add_argument("--single", choices=("kept", "recomputed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        print(peak_rise_mib(options.lengths[0], *options.shape, options.single == "kept"))
        return
    H, P, G, N = options.shape
    print(f"SSD forward + backward, float32, B = 1, (H, P, G, N) = {(H, P, G, N)}: rise of peak memory, MiB\n")
    print("| L | x | states kept | per 1K tokens | states recomputed | per 1K tokens | one L x 64 x H |")
    print("| ---: " * 7 + "|")
    for L in options.lengths:
        row = [f"{L}", f"{L * H * P * 4 / MIB:.0f}"]
        for single in ("kept", "recomputed"):
            command = [sys.executable, __file__, "--single", single, "--lengths", str(L), "--shape"]
            command += [str(value) for value in options.shape]
            rise = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row += [f"{rise:.0f}", f"{rise / L * 1024:.1f}"]
        print("| " + " | ".join([*row, f"{L * 64 * H * 4 / MIB:.0f}"]) + " |")


if __name__ == "__main__":
    main()
