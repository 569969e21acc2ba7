"""Measure the memory of the SSD operator's forward and backward over the sequence length, on the CPU.

    python benchmarks/ssd_memory.py [--lengths 1024 2048 ...] [--shape H P G N]

Each length runs in a process of its own. "Peak" is how far forward and backward raise the peak resident memory above
what inputs, output gradient and libraries take; "kept" is what autograd holds between the two beside the inputs, with
the states of chunks kept or computed again. For comparison: x itself, and one tensor with all pairs of tokens within
chunks of 64 for all heads.
"""

import argparse
import resource
import subprocess
import sys

import torch

from headrace.kernels import ssd_scan

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MIB = 1 << 20


def measure(L: int, H: int, P: int, G: int, N: int, keep_states: bool) -> tuple[float, float]:
    """Return by how many MiB a forward and backward pass raises this process's peak, and how many it keeps between."""
    torch.set_num_threads(1)
    _run(64, (H, P, G, N), keep_states)  # loads libraries
    return _run(L, (H, P, G, N), keep_states)


def _run(L: int, shape: tuple[int, int, int, int], keep_states: bool) -> tuple[float, float]:
    H, P, G, N = shape
    tensors = [torch.randn(1, L, H, P), torch.rand(1, L, H) * 0.1, -torch.rand(H) - 1]
    tensors += [torch.randn(1, L, G, N), torch.randn(1, L, G, N), torch.ones(H)]
    inputs = [t.requires_grad_() for t in tensors]
    dy_BLHP = torch.randn(1, L, H, P)
    kept: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        if all(value.data_ptr() != t.data_ptr() for t in inputs):
            kept[value.data_ptr()] = value.untyped_storage().nbytes()
        return value

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y, _ = ssd_scan(*inputs, keep_states=keep_states)
    torch.autograd.grad(y, inputs, dy_BLHP)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return rise / MIB, sum(kept.values()) / MIB


def main() -> None:
    """Print a table, or one figure when called for a single length by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shape", type=int, nargs=4, default=(24, 64, 1, 128), metavar=tuple("HPGN"))
    parser.add_argument("--single", choices=("kept", "recomputed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        print(*measure(options.lengths[0], *options.shape, options.single == "kept"))
        return
    H, P, G, N = options.shape
    print(f"SSD forward + backward, float32, B = 1, (H, P, G, N) = {(H, P, G, N)}, MiB\n")
    print("| L | peak, states kept | per 1K tokens | kept | peak, states recomputed | kept | x | one L x 64 x H |")
    print("| ---: " * 8 + "|")
    for L in options.lengths:
        row = [f"{L}"]
        for single in ("kept", "recomputed"):
            command = [sys.executable, __file__, "--single", single, "--lengths", str(L), "--shape"]
            command += [str(value) for value in options.shape]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, kept = (float(value) for value in output.split())
            per_1k = [f"{peak / L * 1024:.1f}"] if single == "kept" else []
            row += [f"{peak:.0f}", *per_1k, f"{kept:.0f}"]
        print("| " + " | ".join([*row, f"{L * H * P * 4 / MIB:.0f}", f"{L * 64 * H * 4 / MIB:.0f}"]) + " |")


if __name__ == "__main__":
    main()
