"""Check and time all kernels on the GPU at hand, beside other implementations: one command, one table a part.

    python benchmarks/kernels_gpu.py [--parts a,b,c,d,e,f] [--write [FILE]] [--dry-run]

| part | what                                                                                    |
| ---- | --------------------------------------------------------------------------------------- |
| a    | errors against the definition in float64, of the kernels and of what else is installed  |
| b    | whether three runs give the same bits                                                   |
| c    | tensors of more than 2^31 elements                                                      |
| d    | launches a call                                                                         |
| e    | seconds from a fresh process to the first gradients                                     |
| f    | times beside mamba_ssm, flash-linear-attention and PyTorch's own operators              |

`--write` keeps the tables, after every part, in FILE or docs/results/kernels-<device>-<date>.md. `--dry-run` takes
small sizes, the CPU and Triton's interpreter, and runs what it would time once. Each part has a process of its own on a
GPU, so that none can break the next. The exit status is 1 when anything failed. Needs `headrace` to be importable:
where it is not installed, put the repository under that name on PYTHONPATH
(`mkdir -p /tmp/path; ln -sfn "$PWD" /tmp/path/headrace; export PYTHONPATH=/tmp/path`).
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
# Others' autotuning, in one process, serves the next.
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")

import torch
from torch import Tensor

from gpu_checks import Settings, accuracy, beyond, by, cold_start, launches, repeatability
from gpu_measure import Table, Timed, gradients, interleaved, leaves_of, output_gradients
from gpu_operators import OPERATORS, SSD, Operator, Outputs, Problem
from gpu_rivals import ssd_rivals

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 15
PART_LIMIT_S = 540


def times(settings: Settings) -> list[Table]:
    """Times of forward and backward passes, all paths of a problem in turns."""
    return [_ssd_times(settings), _other_times(settings)]


def _ssd_times(settings: Settings) -> Table:
    table = Table(
        "SSD: times",
        ("B×L×H×P×G×N", "path", "forward µs", "backward µs", "sum µs", "× headrace", "host µs"),
        "Medians of runs in turns, caches flushed, the card's clock; inputs bfloat16, step sizes and decays float32, "
        "no documents. Host: until both passes were under way, in Python.",
    )
    dtype = "fp32" if settings.dry else "bf16"
    for sizes in (SSD.dry,) if settings.dry else SSD.timed:
        with table.guarded(by(sizes)):
            problem = settings.make(SSD, dtype, sizes, everything=False)
            rivals, missing = ssd_rivals(settings.device, reset=False)
            paths: dict[str, Callable[..., Outputs]] = {"headrace": partial(problem.call, "triton")}
            paths |= {name: lambda *t, rival=rival: rival(*t, None) for name, rival in rivals.items()}
            timed = _time_paths(table, by(sizes), problem, paths, settings.device)
            for name, (forward, backward) in timed.items():
                total = forward.device + backward.device
                ratio = ""
                if "headrace" in timed:
                    ratio = f"{total / sum(t.device for t in timed['headrace']):.2f}"
                figures = (f"{value:.0f}" for value in (forward.device, backward.device, total))
                table.add(by(sizes), name, *figures, ratio, f"{forward.host + backward.host:.0f}")
            for name, reason in missing.items():
                table.add(by(sizes), name, f"not compared: {reason}")
    return table


def _other_times(settings: Settings) -> Table:
    table = Table(
        "Other operators: times",
        ("operator", "sizes", "path", "forward µs", "backward µs", "× headrace", "forward rate", "backward rate"),
        "As above. Rates count each input and output once, whatever a path moves; of linear_cross_entropy, whose "
        "gradients are ready after the forward pass, the operations of both passes together.",
    )
    dtype = "fp32" if settings.dry else "bf16"
    for operator in OPERATORS:
        if operator is SSD:
            continue
        for sizes in (operator.dry,) if settings.dry else operator.timed:
            with table.guarded(operator.name, by(sizes)):
                _time_operator(table, settings, operator, dtype, sizes)
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    return table


def _time_operator(table: Table, settings: Settings, operator: Operator, dtype: str, sizes: tuple[int, ...]) -> None:
    problem = settings.make(operator, dtype, sizes, everything=False)
    paths: dict[str, Callable[..., Outputs]] = {"headrace": partial(problem.call, "triton")}
    if problem.native is not None:
        paths["torch"] = problem.native
    timed = _time_paths(table, f"{operator.name} {by(sizes)}", problem, paths, settings.device)
    moved = problem.traffic or _traffic(problem)
    for name, passes in timed.items():
        total = sum(t.device for t in passes)
        if problem.flops:
            rates = [f"{problem.flops / total / 1e6:.0f} TFLOP/s in all", ""]
        else:
            rates = [f"{size / t.device / 1e3:.0f} GB/s" for size, t in zip(moved, passes, strict=True)]
        ratio = f"{total / sum(t.device for t in timed['headrace']):.2f}" if "headrace" in timed else ""
        table.add(operator.name, by(sizes), name, *(f"{t.device:.0f}" for t in passes), ratio, *rates)


def _traffic(problem: Problem) -> tuple[int, int]:
    """Bytes of leaves and outputs forward; of leaves, output gradients and gradients backward."""
    leaves = sum(t.nbytes for t in problem.tensors.values() if t is not None)
    with torch.no_grad():
        outputs = problem.call("triton", *problem.tensors.values())[: problem.trained]
    written = sum(t.nbytes for t in outputs)
    return leaves + written, 2 * leaves + written


def _time_paths(
    table: Table, case: str, problem: Problem, paths: dict[str, Callable[..., Outputs]], device: str
) -> dict[str, tuple[Timed, Timed]]:
    """Times of the forward and the backward pass of each path that runs."""
    leaves = leaves_of(list(problem.tensors.values()))
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    douts: tuple[Tensor, ...] | None = None
    for name, call in paths.items():
        with table.guarded(case, name):
            outputs = call(*leaves)[: problem.trained]
            douts = output_gradients(outputs) if douts is None else douts
            used = tuple(d.to(out.dtype) for d, out in zip(douts, outputs, strict=True))
            gradients(outputs, leaves, used, again=True)
            forward[name] = partial(call, *leaves)
            backward[name] = partial(gradients, outputs, leaves, used, again=True)
    before, after = interleaved(forward, device, ROUNDS), interleaved(backward, device, ROUNDS)
    return {name: (before[name], after[name]) for name in forward}


PARTS: dict[str, Callable[[Settings], list[Table]]] = {
    "a": accuracy,
    "b": repeatability,
    "c": beyond,
    "d": launches,
    "e": cold_start,
    "f": times,
}


def header(device_name: str) -> str:
    """What was measured, when, and on what."""
    import triton

    lines = [
        f"# Kernels on {device_name}",
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, triton {triton.__version__}, "
        f"driver {_output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')}, "
        f"commit {_output('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD')}, by benchmarks/kernels_gpu.py.",
    ]
    return "\n".join(lines) + "\n"


def _output(*command: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return text.split("\n")[0].strip() or "unknown"


def run_part(part: str, settings: Settings) -> tuple[str, int]:
    """Text and exit status of a part in this process."""
    try:
        tables = PARTS[part](settings)
    except Exception as error:  # the other parts still run
        tables = [Table(f"Part {part}", ("error",))]
        with tables[0].guarded():
            raise error
    return "\n".join(table.text() for table in tables), int(any(table.failures for table in tables))


def run_apart(part: str) -> tuple[str, int]:
    """Text and exit status of a part in a process of its own, which an illegal address ends without the others."""
    command = [sys.executable, __file__, "--parts", part, "--alone"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PART_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"## Part {part}\n\n- **failed**: not done after {PART_LIMIT_S} s\n", 1
    if done.returncode not in (0, 1) or not done.stdout.strip():
        return f"{done.stdout}\n## Part {part}\n\n- **failed**: its process ended with {done.returncode}\n", 1
    return done.stdout, done.returncode


def main() -> int:
    """Run the parts, print their tables, keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="letters, with commas")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--write", nargs="?", const="", metavar="FILE")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # a part's own process
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"parts {unknown} are not known; use {', '.join(PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible; use --dry-run")
    settings = Settings("cuda", {"bf16": torch.bfloat16, "fp32": torch.float32}, dry=False)
    if options.dry_run:
        torch.set_num_threads(1)
        settings = Settings("cpu", {"fp32": torch.float32}, dry=True)
    if options.alone:
        text, status = run_part(parts[0], settings)
        print(text)
        return status
    name = "Triton's interpreter (dry run)" if options.dry_run else torch.cuda.get_device_name()
    device = "interpreter" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", name.lower())
    path = Path(options.write or ROOT / f"docs/results/kernels-{device}-{time.strftime('%Y-%m-%d')}.md")
    texts, failed = [header(name)], False
    print(texts[0], flush=True)
    for part in parts:
        text, status = run_part(part, settings) if options.dry_run else run_apart(part)
        texts.append(text)
        failed |= bool(status)
        print(text, flush=True)
        if options.write is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(texts))
    failures = [line for text in texts for line in text.split("\n") if line.startswith("- **failed**")]
    print(*failures, "Something failed." if failed else "Nothing failed.", sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
