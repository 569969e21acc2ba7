"""What it costs to work on a row as several segments in one process: the scan cut and passed states, against uncut.

`python benchmarks/virtual_segments.py`, on the CPU or, with `--device cuda`, on a GPU; medians of turns taken side by
side, forward and backward.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from headrace.kernels import ssd_scan
from headrace.kernels.affine import SCALAR
from headrace.kernels.ssd.segmented import ssd_segments
from headrace.parallel.exchange import StateExchange
from headrace.parallel.layout import contiguous


def main() -> None:
    """Print the ratio for each number of segments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=6, default=(1, 8192, 24, 64, 1, 128), metavar=tuple("BLHPGN"))
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    B, L, H, P, G, N = options.shape
    tensors = [torch.randn(B, L, H, P), torch.rand(B, L, H) * 0.1, -torch.rand(H) - 1]
    tensors += [torch.randn(B, L, G, N), torch.randn(B, L, G, N), torch.ones(H)]
    inputs = [tensor.to(options.device).requires_grad_() for tensor in tensors]
    dy_BLHP = torch.randn_like(inputs[0])

    def turn(count: int) -> float:
        layout = contiguous(L, 1, max(1, count))
        exchange = StateExchange(layout, dist.group.WORLD, "auto", SCALAR)  # type: ignore[arg-type]
        places = [layout.place(segment) for segment in range(count)]
        began = time.perf_counter()
        y = ssd_segments(*inputs, segments=places, exchange=exchange) if count else ssd_scan(*inputs)[0]
        torch.autograd.grad(y, inputs, dy_BLHP)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    kinds = [0, *options.segments]
    for count in kinds:
        turn(count)
    seconds = {count: [] for count in kinds}
    for _ in range(options.rounds):
        for count in kinds:
            seconds[count].append(turn(count))
    uncut = statistics.median(seconds[0])
    print(f"(B, L, H, P, G, N) = {tuple(options.shape)}, {options.device}: uncut {uncut * 1e3:.1f} ms\n")
    print("| segments | x uncut |\n| ---: | ---: |")
    for count in options.segments:
        print(f"| {count} | {statistics.median(seconds[count]) / uncut:.3f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
