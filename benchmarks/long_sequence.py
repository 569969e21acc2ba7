"""One training step on a single very long row, shared out over cp processes: time, loss, and peak memory per process.

`python benchmarks/long_sequence.py` starts four processes a length, up to 1,048,576 tokens, and beside each one process
that takes as many tokens as one of the four holds: passing states must cost no memory that grows with the row.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.lm import HybridLM
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.parallel.config import ParallelConfig
from headrace.parallel.context import share_row
from headrace.parallel.fsdp import materialise
from headrace.parallel.mesh import build_mesh, start_world
from headrace.parallel.spread import spread_model

MODEL = ModelConfig(
    vocab_size=256,
    d_model=64,
    pattern="2*(mamba2 mlp)",
    mamba2=Mamba2Config(head_dim=32, d_state=16),
    mlp=MLPConfig(d_hidden=128, activation="relu2"),
)


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def step(length: int, ranks: int) -> None:
    """One step of this process; prints what it took as JSON on the first rank."""
    world = start_world()
    torch.set_num_threads(1)
    parallel = ParallelConfig(cp=ranks)
    mesh = build_mesh(parallel, world)
    with torch.device("meta"):
        model = HybridLM(MODEL)
    spread_model(model, mesh, parallel, recompute="full")
    materialise(model, world.device, 1)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(256, (1, length + 1), generator=generator)
    reset = torch.rand(1, length, generator=generator) < 1e-4
    (tokens, targets), seq = share_row(parallel, mesh, [row[:, :-1], row[:, 1:]], reset)
    dist.barrier()
    before, began, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    loss_sum, _ = model(tokens, seq, targets)
    (loss_sum * ranks / length).backward()
    measured = torch.tensor([float(loss_sum.detach()), peak_bytes() - before, time.process_time() - cpu]).double()
    everyone = [torch.empty_like(measured) for _ in range(ranks)]
    dist.all_gather(everyone, measured)
    if world.is_first:
        loss, peak, cpu_s = zip(*(values.tolist() for values in everyone), strict=True)
        seconds = time.perf_counter() - began
        print(json.dumps({"loss": sum(loss) / length, "peak": max(peak), "cpu_s": sum(cpu_s), "seconds": seconds}))
    dist.destroy_process_group()


def run(length: int, ranks: int) -> dict[str, float]:
    """One step in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", str(length), str(ranks)]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    return json.loads(outputs[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in (17, 18, 19, 20)])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        step(*options.worker)
        return
    print(f"{MODEL.num_params():,} parameters, {MODEL.pattern}, float32, recompute=full, peak above the model's own\n")
    print(f"| tokens | MiB per process, cp={options.ranks} | bytes per own token | MiB, one process with as many "
          "| ratio | loss | CPU seconds |")  # fmt: skip
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in options.lengths:
        own = length // options.ranks
        spread, alone = run(length, options.ranks), run(own, 1)
        mib = (f"{peak / 2**20:,.0f}" for peak in (spread["peak"], alone["peak"]))
        cells = [f"{length:,}", next(mib), f"{spread['peak'] / own:,.0f}", next(mib)]
        cells += [f"{spread['peak'] / alone['peak']:.2f}", f"{spread['loss']:.6f}", f"{spread['cpu_s']:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    whole = run(options.lengths[0], 1)
    print(f"\nloss of one process on the whole {options.lengths[0]:,} tokens: {whole['loss']:.6f}")


if __name__ == "__main__":
    main()
