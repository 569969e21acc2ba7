"""Find the best tiles of every kernel for the GPU at hand and write them to kernels/tiles.toml.

    python benchmarks/tune.py [--only ssd,swiglu] [--seconds 500] [--to FILE] [--dry-run]

From the rows in use, it goes to the best neighbour (one block size, number of warps or of stages changed) as long as
that is at least 2% faster. A candidate first runs in a process of its own, where it is dropped when it fails or its
results are not those of the row in use; those that are left are timed in turns. Rows of other architectures and
comments stay as they are; the file is replaced as a whole after each kernel, so that what is done is kept. `--seconds`
stops the search; `--dry-run` goes through it with two candidates a kernel in Triton's interpreter and writes nothing.
`headrace` must be importable, as for `kernels_gpu.py`.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch

from gpu_checks import Settings
from gpu_measure import gradients, interleaved, leaves_of, output_gradients, relative_error, run
from gpu_operators import OPERATORS, Problem

TABLE = Path(__file__).resolve().parents[1] / "kernels/tiles.toml"
WORTH = 0.98
# Other tiles round otherwise; a wrong block of many shows far above.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
ROUNDS = 9
CHECKS_AT_A_TIME = 8
CHECK_LIMIT_S = 240

Row = dict[str, int]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """Kernels that share rows of the table: the operators that run them, in which dtype, and which pass is timed.

    `cases` gives operators and sizes for a row, by the number in the row's name (0 where there is none).
    """

    cases: Callable[[int], list[tuple[str, Sizes]]]
    timed: str = "both"
    dtype: str = "bf16"


def _ssd(N: int) -> list[tuple[str, Sizes]]:
    if N == 128:
        return [("ssd_scan", (8, 2048, 80, 64, 1, N)), ("ssd_scan", (4, 4096, 128, 64, 8, N))]
    return [("ssd_scan", (4, 4096, 64, 64, 8, N))]


def _norms(D: int) -> list[tuple[str, Sizes]]:
    tokens = 4096 if D <= 4096 else 1024
    return [("gated_rms_norm", (4, tokens, D, 1)), ("add_rms_norm", (4, tokens, D))]


def _selective_scan(N: int) -> list[tuple[str, Sizes]]:
    return [("selective_scan", (4, 2048, 5120 if N <= 16 else 2048, N))]


def _segments(_: int) -> list[tuple[str, Sizes]]:
    return [("selective_scan", (1, 16384, 1024, 16))]


FAMILIES = {
    "swiglu": Family(lambda _: [("swiglu", (4, 4096, 5504))]),
    "adamw_8bit": Family(lambda _: [("adamw_8bit", (8192, 8192))], "forward", "fp32"),
    "ssd": Family(_ssd),
    "ssd_exact": Family(lambda N: [("ssd_scan", (2, 2048, 64, 64, 1, N))], dtype="fp32"),
    "conv1d_forward": Family(lambda K: [("causal_conv1d", (4, 4096, 6144, K))], "forward"),
    "conv1d_backward": Family(lambda K: [("causal_conv1d", (4, 4096, 6144, K))], "backward"),
    "conv1d_reduce": Family(lambda _: [("causal_conv1d", (1, 65536, 4352, 4))], "backward"),
    # Narrow inputs, so that the products do not hide the kernel.
    "cross_entropy": Family(lambda _: [("linear_cross_entropy", (8192, 64, 50280))], "forward"),
    "cross_entropy.narrow": Family(lambda _: [("linear_cross_entropy", (32768, 64, 4096))], "forward"),
    "scale_gradient": Family(lambda _: [("linear_cross_entropy", (16384, 2048, 1024))], "backward"),
    "norm_forward": Family(_norms, "forward"),
    "norm_backward": Family(_norms, "backward"),
    "embedding_backward": Family(
        lambda _: [("embedding", (16384, 50280, 2048)), ("embedding", (65536, 256, 768))], "backward"
    ),
    "expert_order": Family(lambda _: [("permute", (16384, 8, 128, 256))], "forward"),
    "expert_clear": Family(lambda _: [("permute", (16384, 8, 128, 2048))], "forward"),
    "expert_rows": Family(lambda _: [(name, (16384, 8, 128, 2048)) for name in ("permute", "unpermute")]),
    "grouped_linear": Family(lambda _: [("grouped_linear", (131072, 128, 768, 2048))], "forward"),
    "grouped_linear.few": Family(lambda _: [("grouped_linear", (4096, 128, 768, 2048))], "forward"),
    "grouped_linear.small": Family(lambda _: [("grouped_linear", (32768, 32, 768, 1024))], "forward", "fp32"),
    "grouped_weight_gradient": Family(lambda _: [("grouped_linear", (131072, 128, 768, 2048))], "backward"),
    "grouped_weight_gradient.small": Family(lambda _: [("grouped_linear", (32768, 32, 768, 1024))], "backward", "fp32"),
    "selective_scan_forward": Family(_selective_scan, "forward"),
    "selective_scan_backward": Family(_selective_scan, "backward"),
    "selective_scan_compose": Family(_segments),
    "selective_scan_sum": Family(_segments, "backward"),
}


class Tuner:
    """Tunes the rows of one architecture."""

    def __init__(self, dry: bool, seconds: float) -> None:
        from headrace.kernels.launch import architecture

        device, dtypes = ("cpu", {"fp32": torch.float32}) if dry else ("cuda", {"bf16": torch.bfloat16})
        self.settings = Settings(device, dtypes | {"fp32": torch.float32}, dry)
        self.arch = architecture(torch.empty(0, device=device))
        self.until = time.monotonic() + seconds

    def rows(self, kernel: str) -> dict[str, Row]:
        """The rows in use on this architecture."""
        from headrace.kernels import tiles

        by_arch = tiles._table()[kernel]
        return {size: dict(row) for size, row in by_arch[tiles._nearest(self.arch, tuple(by_arch))].items()}

    @contextmanager
    def using(self, kernel: str, size: str, row: Row) -> Iterator[None]:
        """Let kernels take `row`."""
        from headrace.kernels import tiles

        by_arch, rows = tiles._table()[kernel], self.rows(kernel)
        before = by_arch.get(self.arch)
        by_arch[self.arch] = rows | {size: row}
        tiles.tile.cache_clear()
        try:
            yield
        finally:
            if before is None:
                del by_arch[self.arch]
            else:
                by_arch[self.arch] = before
            tiles.tile.cache_clear()

    def dtype(self, kernel: str, size: str) -> str:
        """The dtype that a row is judged in."""
        return "fp32" if self.settings.dry else family_of(kernel, size).dtype

    def problems(self, kernel: str, size: str) -> list[Problem]:
        """What the row is judged by."""
        family = family_of(kernel, size)
        number = re.search(r"\d+", size)
        dtype = self.dtype(kernel, size)
        found = []
        for name, sizes in family.cases(int(number[0]) if number else 0):
            operator = next(operator for operator in OPERATORS if operator.name == name)
            found.append(self.settings.make(operator, dtype, operator.dry if self.settings.dry else sizes, False))
        return found

    def check(self, kernel: str, size: str, rows: list[Row]) -> list[str]:
        """For each row, what is wrong with its results, by those of the row in use, or nothing."""
        found = [""] * len(rows)
        for problem in self.problems(kernel, size):
            call, tensors = partial(problem.call, "triton"), list(problem.tensors.values())
            outputs, grads, douts = run(call, tensors)
            for index, row in enumerate(rows):
                try:
                    with self.using(kernel, size, row):
                        results = run(call, tensors, douts)
                except Exception as error:  # a compiler's or a launch's
                    found[index] = f"{type(error).__name__}: {str(error)[:120]}"
                    continue
                pairs = zip((*results[0], *results[1]), (*outputs, *grads), strict=True)
                errors = [relative_error(actual, usual) for actual, usual in pairs]
                if not all(error <= TOLERANCE[self.dtype(kernel, size)] for error in errors):  # NaN is not
                    found[index] = f"results differ by {max(errors):.1e}"
        return found

    def check_apart(self, kernel: str, size: str, row: Row) -> str:
        """The same of one row in a process of its own, which also leaves compiled kernels in Triton's cache."""
        command = [sys.executable, __file__, "--check", kernel, size, json.dumps(row)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"not done after {CHECK_LIMIT_S} s"
        if done.returncode:
            return f"ended with {done.returncode}: {done.stderr.strip()[-120:]}"
        return done.stdout.strip().split("\n")[-1]

    def time(self, kernel: str, size: str, rows: list[Row]) -> list[float]:
        """Times of the rows relative to the first, the geometric mean over the problems."""
        logs = [0.0] * len(rows)
        problems = self.problems(kernel, size)
        for problem in problems:
            leaves = leaves_of(list(problem.tensors.values()))
            calls = {str(i): self._timed_call(kernel, size, row, problem, leaves) for i, row in enumerate(rows)}
            times = [timed.device for timed in interleaved(calls, self.settings.device, ROUNDS).values()]
            logs = [log + math.log(t / times[0]) for log, t in zip(logs, times, strict=True)]
        return [math.exp(log / len(problems)) for log in logs]

    def _timed_call(
        self, kernel: str, size: str, row: Row, problem: Problem, leaves: list[torch.Tensor | None]
    ) -> Callable[[], object]:
        timed = family_of(kernel, size).timed

        def forward() -> tuple[torch.Tensor, ...]:
            return problem.call("triton", *leaves)[: problem.trained]

        with self.using(kernel, size, row):
            outputs = forward()
        douts = output_gradients(outputs)

        def call() -> None:
            with self.using(kernel, size, row):
                new = outputs if timed == "backward" else forward()
                if timed != "forward":
                    gradients(new, leaves, douts, again=timed == "backward")

        return call

    def tune(self, kernel: str, size: str) -> tuple[Row, float]:
        """The best row that the search meets, and its time relative to the row in use."""
        best, gain = self.rows(kernel)[size], 1.0
        tried = [best]
        while time.monotonic() < self.until:
            candidates = [row for row in neighbours(best) if row not in tried]
            candidates = candidates[:2] if self.settings.dry else candidates
            tried += candidates
            if self.settings.dry:
                problems = self.check(kernel, size, candidates)
            else:
                with ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
                    problems = list(pool.map(partial(self.check_apart, kernel, size), candidates))
            for row, problem in zip(candidates, problems, strict=True):
                if problem:
                    print(f"  {kernel}.{size} {difference(best, row)}: dropped, {problem}", flush=True)
            good = [row for row, problem in zip(candidates, problems, strict=True) if not problem]
            scores = self.time(kernel, size, [best, *good]) if good else [1.0]
            for row, score in zip(good, scores[1:], strict=True):
                print(f"  {kernel}.{size} {difference(best, row)}: {score:.3f} of the time", flush=True)
            winner = min(range(len(scores)), key=scores.__getitem__)
            if winner == 0 or scores[winner] > WORTH:
                break
            best, gain = [best, *good][winner], gain * scores[winner]
            if self.settings.dry:
                break
        return best, gain


def family_of(kernel: str, size: str) -> Family:
    """The family of a row; some have one of their own."""
    return FAMILIES.get(f"{kernel}.{size}", FAMILIES[kernel])


def neighbours(row: Row) -> list[Row]:
    """Rows that differ in one choice: a stage more or less, twice or half of all else."""
    found = []
    for name, value in row.items():
        most = 4 if name.endswith("stages") else 32 if name.endswith("warps") else 1 << 20
        others = (value - 1, value + 1) if name.endswith("stages") else (value // 2, value * 2)
        found += [row | {name: other} for other in others if 1 <= other <= most and other != value]
    return found


def difference(before: Row, after: Row) -> str:
    """What changed."""
    return ", ".join(f"{name} {before[name]} -> {value}" for name, value in after.items() if before[name] != value)


def with_rows(text: str, kernel: str, arch: str, rows: dict[str, tuple[Row, str]], after: str) -> str:
    """The table with the rows of `arch` for a kernel replaced, or added below those of the architecture `after`.

    `rows` holds each row and a comment, or none. Raises RuntimeError when the result is not what was asked for.
    """
    lines = text.split("\n")
    for size, (row, comment) in rows.items():
        begin = lines.index(f"[{kernel}]")
        end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("[")), len(lines))

        def find(name: str, begin: int = begin, end: int = end) -> int | None:
            return next((i for i in range(begin, end) if lines[i].startswith(f"{name} = ")), None)

        line = f"{arch}.{size} = {{ {', '.join(f'{name} = {value}' for name, value in row.items())} }}"
        line += f"  # {comment}" if comment else ""
        old, place = find(f"{arch}.{size}"), find(f"{after}.{size}")
        if old is not None:
            lines[old] = line
        else:
            lines.insert(end if place is None else place + 1, line)
    written = "\n".join(lines)
    expected = tomllib.loads(text)
    expected[kernel][arch] = {size: row for size, (row, _) in rows.items()}
    if tomllib.loads(written) != expected:
        raise RuntimeError(f"the new rows of {kernel} would change others; kernels/tiles.toml is left as it was")
    return written


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def tune_kernel(tuner: Tuner, kernel: str, text: str, card: str) -> str:
    """The table's text with the best rows of one kernel."""
    from headrace.kernels import tiles

    source = tiles._nearest(tuner.arch, tuple(tiles._table()[kernel]))
    comments = dict(re.findall(rf"^{re.escape(tuner.arch)}\.(\w+) = .*?\}} +# (.*)$", _section(text, kernel), re.M))
    rows = {size: (row, comments.get(size, "")) for size, row in tuner.rows(kernel).items()}
    for size in list(rows)[:1] if tuner.settings.dry else list(rows):
        if time.monotonic() > tuner.until:
            print(f"{kernel}.{size}: no time left", flush=True)
            break
        best, gain = tuner.tune(kernel, size)
        changed = f"{gain:.2f} of the time before; " if gain != 1.0 else "the best of its neighbours; "
        rows[size] = best, f"{changed}{card}, {time.strftime('%Y-%m-%d')}"
        print(f"{kernel}.{size}: {difference(tuner.rows(kernel)[size], best) or 'stays'}", flush=True)
    return with_rows(text, kernel, tuner.arch, rows, source)


def _section(text: str, kernel: str) -> str:
    return text.split(f"[{kernel}]\n")[1].split("\n[")[0]


def main() -> int:
    """Tune, write, or check one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(name for name in FAMILIES if "." not in name))
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new search begins after these")
    parser.add_argument("--to", type=Path, default=TABLE, help="where the table is written")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--check", nargs=3, help=argparse.SUPPRESS)  # a candidate's own process
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible; use --dry-run")
    tuner = Tuner(options.dry_run, options.seconds)
    if options.check:
        kernel, size, row = options.check
        print(*tuner.check(kernel, size, [json.loads(row)]))
        return 0
    card = "interpreter" if options.dry_run else torch.cuda.get_device_name()
    text, failed = TABLE.read_text(), False
    for kernel in options.only.split(","):
        if time.monotonic() > tuner.until:
            break
        try:
            text = tune_kernel(tuner, kernel, text, card)
        except Exception as error:  # the other kernels still get their rows
            print(f"{kernel}: failed, {type(error).__name__}: {error}", flush=True)
            failed = True
            continue
        if options.dry_run:
            print(f"would write:\n[{kernel}]\n{_section(text, kernel).strip()}", flush=True)
        else:
            replace_file(options.to, text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
