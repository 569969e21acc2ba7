"""Time and memory of an update by every optimizer, on the layers of mamba2-130m.

`python benchmarks/optimizers.py` prints, for each: seconds of an update and their ratio to torch's fused AdamW (the
median over rounds, in each of which all are timed one after the other), bytes of state a parameter, and the most memory
that an update needs beside parameters, gradients and state (in a process of its own). CPU-seconds on one thread, or
seconds on a GPU where there is one. bitsandbytes, and torchao on a GPU, are taken where they are installed. Low-rank
methods are timed between two choices of a basis. `--bandwidth 32768` times the 8-bit update of 2^30 parameters beside a
copy.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headrace.kernels.adamw_8bit import BlockGrid, Moments, Update, adamw_8bit_
from headrace.model.lm import HybridLM
from headrace.model.presets import PRESETS
from headrace.pretrain.optimizers.build import build_optimizers
from headrace.pretrain.optimizers.config import OptimizerConfig
from headrace.pretrain.optimizers.low_rank.config import LowRankConfig
from headrace.pretrain.optimizers.size import state_size

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = (
    "galore",
    "online_subspace",
    "grass",
    "flora",
    "grass_walk",
    "grass_jump",
    "subset_norm",
    "subspace_momentum",
)
OURS: dict[str, OptimizerConfig] = {
    "AdamW": OptimizerConfig(),
    "AdamW, 8 bits": OptimizerConfig(state_bits=8, embedding_bits=8),
    "Muon": OptimizerConfig(kind="muon"),
    **{
        name: OptimizerConfig(kind="low_rank", low_rank=LowRankConfig(method=name, rank=64, min_side=64))
        for name in METHODS
    },
}


@dataclass
class Rival:
    """An optimizer on its own copy of the parameters: what takes a step, and the bytes it keeps."""

    step: Callable[[], object]
    state_bytes: Callable[[], int]
    parameters: int


def build_model(layers: int) -> HybridLM:
    """Layers of mamba2-130m under a small vocabulary, with gradients."""
    config = replace(PRESETS["mamba2-130m"], vocab_size=2048, pattern=f"{layers}*mamba2")
    model = HybridLM(config)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-3)
    return model.to(DEVICE)


def build(name: str, layers: int) -> Rival:
    """The optimizer of that name."""
    model = build_model(layers)
    count = sum(parameter.numel() for parameter in model.parameters())
    if name in OURS:
        return _ours(model, OURS[name], count)
    inner = _theirs(name, model.parameters())

    def state_bytes() -> int:
        tensors = [
            t for slots in inner.state.values() for t in slots.values() if isinstance(t, torch.Tensor) and t.ndim
        ]
        books = {id(t): t for t in tensors if t.numel() == 256 and t.dtype == torch.float32}  # shared by all
        return sum(t.nbytes for t in tensors if id(t) not in books)

    return Rival(inner.step, state_bytes, count)


def _ours(model: HybridLM, config: OptimizerConfig, count: int) -> Rival:
    optimizers = build_optimizers([model], config)
    skip = torch.zeros((), device=DEVICE)
    gradients = {parameter: parameter.grad for parameter in model.parameters()}

    def step() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step(1.0, skip)

    return Rival(step, lambda: state_size(optimizers).whole, count)


def _theirs(name: str, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "bitsandbytes AdamW8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)
    if name == "torchao AdamW8bit":
        import torchao

        return torchao.optim.AdamW8bit(parameters, lr=1e-3)
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def names() -> list[str]:
    """What can be timed here, the measure of all first."""
    found = ["torch fused AdamW", *OURS]
    if importlib.util.find_spec("bitsandbytes"):
        found.append("bitsandbytes AdamW8bit")
    if DEVICE.type == "cuda" and importlib.util.find_spec("torchao"):
        found.append("torchao AdamW8bit")
    return found


def timed(step: Callable[[], object]) -> float:
    """Seconds of one step."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


def peak(name: str, layers: int) -> int:
    """Bytes that steps need beside parameters, gradients and state, in this process."""
    rival = build(name, layers)
    rival.step()
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rival.step()
        return torch.cuda.max_memory_allocated() - before
    own = Path("/proc/self")
    held = int((own / "statm").read_text().split()[1]) * resource.getpagesize()
    (own / "clear_refs").write_text("5")  # the peak begins anew
    rival.step()
    status = (own / "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - held


def peak_apart(name: str, layers: int) -> int:
    """`peak` in a new process."""
    command = [sys.executable, __file__, "--peak-of", name, "--layers", str(layers)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def bandwidth(side: int, rounds: int) -> None:
    """An update of one float32 parameter `(side, side)` with 8-bit moments, beside a copy of as many bytes."""
    grid = BlockGrid.whole(side, 256)
    p, grad = (torch.randn(side, side, device=DEVICE) for _ in range(2))
    moments = Moments.zeros(side, side, grid.num_blocks, DEVICE)
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    update = Update(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=one, skip=zero)
    # Read: parameter, gradient, two codes; written: all but the gradient; scales are a hundredth of that.
    moved = side * side * (3 * 4 + 4) + 4 * moments.scales1.nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    calls = {"update": lambda: adamw_8bit_(p, grad, moments, update, grid=grid), "copy": lambda: target.copy_(source)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    rates = {name: moved / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}
    share = rates["update"] / rates["copy"]
    print(
        f"{side * side:,} numbers: update {rates['update']:.1f} GB/s, copy {rates['copy']:.1f} GB/s, {share:.2f} of it"
    )


def main() -> None:
    """Time all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="names, beside torch's")
    parser.add_argument(
        "--bandwidth", type=int, metavar="SIDE", help="only an update of SIDE x SIDE numbers, and a copy"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(json.dumps(peak(options.peak_of, options.layers)))
        return
    if options.bandwidth:
        bandwidth(options.bandwidth, options.rounds)
        return
    chosen = [name for name in names() if not options.only or name in ("torch fused AdamW", *options.only)]
    rivals = {name: build(name, options.layers) for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for rival in rivals.values():
        rival.step()  # state is made, kernels compiled
    for _ in range(options.rounds):
        for name, rival in rivals.items():
            seconds[name].append(timed(rival.step))
    first = seconds[chosen[0]]
    print(f"{rivals[chosen[0]].parameters:,} parameters, {DEVICE.type}, torch {torch.__version__}, one thread")
    print(f"{'':24} {'ms':>8} {'ratio':>7} {'state, bytes/param':>19} {'beside, MiB':>12}")
    for name, rival in rivals.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], first, strict=True))
        state = rival.state_bytes() / rival.parameters
        beside = peak_apart(name, options.layers) / 2**20
        print(f"{name:24} {1e3 * statistics.median(seconds[name]):8.1f} {ratio:7.2f} {state:19.3f} {beside:12.1f}")


if __name__ == "__main__":
    main()
