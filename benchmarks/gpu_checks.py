"""The parts of `kernels_gpu.py` that judge: accuracy, repeatability, large tensors, launches, cold start."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpu_measure import Table, gradients, leaves_of, output_gradients, relative_error, run, same_bits
from gpu_operators import OPERATORS, SSD, Operator, Outputs, Problem
from gpu_rivals import ssd_rivals

# Larger errors are failures, unless the reference itself errs a third as much.
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 1e-2}
TIMES_REFERENCE = 3
# What is left when a kernel writes elsewhere is of the size of the result itself.
LARGEST_TAIL_ERROR = 2e-2
# Inputs, outputs, their gradients, and the states of scans, in bytes an element of the first input.
BYTES_BEYOND = 18
LAUNCH_LIMITS = (3, 5)
COLD_START_S = 5.0


@dataclass(frozen=True)
class Settings:
    """Where and how the parts run; `dry` stands for small sizes in the interpreter, everything once."""

    device: str
    dtypes: dict[str, torch.dtype]
    dry: bool

    def sizes(self, operator: Operator) -> tuple[int, ...]:
        """Moderate sizes."""
        return operator.dry if self.dry else operator.exact

    def make(self, operator: Operator, dtype: str, sizes: tuple[int, ...], everything: bool = True) -> Problem:
        """A problem with the same values every time."""
        torch.manual_seed(0)
        return operator.make(self.device, self.dtypes[dtype], sizes, everything)


def by(sizes: tuple[int, ...]) -> str:
    """Sizes as text."""
    return "×".join(map(str, sizes))


def accuracy(settings: Settings) -> list[Table]:
    """Errors of kernels and rivals, beside that of the definition computed in the same dtype."""
    table = Table(
        "Accuracy",
        ("operator", "sizes", "dtype", "path", "result", "error", "error of the definition", "ratio"),
        "Errors are |result - exact| / |exact|, exact by the definition in float64 on the same inputs.",
    )
    cases = [(operator, True) for operator in OPERATORS] + [(SSD, False)]
    for dtype in settings.dtypes:
        for operator, everything in cases:
            name = operator.name if everything else f"{operator.name}, plain"
            with table.guarded(name, by(settings.sizes(operator)), dtype):
                _judge(table, settings, operator, dtype, everything)
    return [table]


def _judge(table: Table, settings: Settings, operator: Operator, dtype: str, everything: bool) -> None:
    sizes = settings.sizes(operator)
    problem = settings.make(operator, dtype, sizes, everything)
    tensors = list(problem.tensors.values())
    reference = partial(problem.call, "reference")
    usual, usual_grads, douts = run(reference, tensors)
    exact, exact_grads, _ = run(reference, tensors, douts, torch.float64)
    names = [*problem.outputs, *(f"d{name}" for name, value in problem.tensors.items() if value is not None)]
    errors = [relative_error(*pair) for pair in zip((*usual, *usual_grads), (*exact, *exact_grads), strict=True)]
    name = operator.name if everything else f"{operator.name}, plain"
    for path, call in _paths(table, settings, operator, problem).items():
        with table.guarded(name, by(sizes), dtype, path):
            outputs, grads, _ = run(call, tensors, douts)
            for what, actual, truth, usual_error in zip(
                names, (*outputs, *grads), (*exact, *exact_grads), errors, strict=True
            ):
                error = relative_error(actual, truth)
                ratio = f"{error / usual_error:.2f}" if usual_error else "none"
                cells = (name, by(sizes), dtype, path, what)
                table.add(*cells, f"{error:.2e}", f"{usual_error:.2e}", ratio)
                allowed = max(LARGEST_ERROR[dtype], TIMES_REFERENCE * usual_error)
                if path == "headrace" and not error <= allowed:  # NaN is not
                    table.fail(*cells, f"error {error:.2e}, allowed {allowed:.2e}")


def _paths(table: Table, settings: Settings, operator: Operator, problem: Problem) -> dict[str, Callable[..., Outputs]]:
    paths: dict[str, Callable[..., Outputs]] = {"headrace": partial(problem.call, "triton")}
    if operator is SSD:
        rivals, missing = ssd_rivals(settings.device, reset=problem.reset is not None)
        for name, rival in rivals.items():
            paths[name] = lambda *tensors, rival=rival: rival(*tensors, problem.reset)
        for name, reason in missing.items():
            table.add(operator.name, "", "", name, f"not compared: {reason}")
    return paths


def repeatability(settings: Settings) -> list[Table]:
    """Whether three runs give the same bits."""
    table = Table("Bitwise repeatability, three runs", ("operator", "sizes", "dtype", "outputs", "gradients"))
    for dtype in settings.dtypes:
        for operator in OPERATORS:
            sizes = operator.dry if settings.dry else operator.timed[0] if dtype == "bf16" else operator.exact
            with table.guarded(operator.name, by(sizes), dtype):
                problem = settings.make(operator, dtype, sizes)
                call, tensors = partial(problem.call, "triton"), list(problem.tensors.values())
                outputs, grads, douts = run(call, tensors)
                same = [True, True]
                for _ in range(2):
                    for index, (now, before) in enumerate(
                        zip(run(call, tensors, douts)[:2], (outputs, grads), strict=True)
                    ):
                        same[index] &= all(map(same_bits, now, before))
                words = ["same" if kept else "**differ**" for kept in same]
                table.add(operator.name, by(sizes), dtype, *words)
                if not all(same):
                    table.fail(operator.name, by(sizes), dtype, "is not repeatable")
    return [table]


def beyond(settings: Settings) -> list[Table]:
    """Whether the last tokens, or rows, of tensors with more than 2**31 elements are as when computed alone."""
    table = Table(
        "More than 2^31 elements: the last part against itself computed alone",
        ("operator", "sizes", "elements", "largest error", "of", "verdict"),
        "Outputs, and gradients of inputs that have an entry a token; scans begin with the state that enters the part.",
    )
    dtype = "fp32" if settings.dry else "bf16"
    for operator in OPERATORS:
        dry = (operator.dry, (2, *operator.dry[1:]))[: len(operator.beyond)]
        for sizes in dry if settings.dry else operator.beyond:
            with table.guarded(operator.name, by(sizes)):
                _judge_beyond(table, settings, operator, dtype, sizes)
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    return [table]


def _judge_beyond(table: Table, settings: Settings, operator: Operator, dtype: str, sizes: tuple[int, ...]) -> None:
    elements = torch.Size(sizes[: 4 if operator is SSD else 3]).numel()
    if settings.device == "cuda":
        free, needed = torch.cuda.mem_get_info()[0], BYTES_BEYOND * elements + (2 << 30)
        if free < needed:
            reason = f"skipped: needs about {needed >> 30} GiB of GPU memory, {free >> 30} are free"
            table.add(operator.name, by(sizes), elements, "", "", reason)
            return
    problem = settings.make(operator, dtype, sizes, everything=False)
    leaves = {name: None if t is None else t.requires_grad_() for name, t in problem.tensors.items()}
    outputs = problem.call("triton", *leaves.values())
    douts = output_gradients(outputs)
    given = [name for name, leaf in leaves.items() if leaf is not None]
    results = dict(zip(problem.outputs, outputs, strict=True))
    results |= zip((f"d{name}" for name in given), gradients(outputs, list(leaves.values()), douts), strict=True)
    by_row = sizes[0] > 1
    length = 4 if settings.dry else 4096
    cut = (lambda t: t[-1:]) if by_row else (lambda t: t[:, -length:])
    alone = _tail_alone(problem, leaves, dict(zip(problem.outputs, douts, strict=True)), cut, by_row, length)
    errors = {}
    for name, value in alone.items():
        whole = results[name]
        carried = name == "final_state" and not by_row
        errors[name] = relative_error(whole if carried else cut(whole), value)
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    good = errors[worst] <= LARGEST_TAIL_ERROR
    table.add(operator.name, by(sizes), elements, f"{errors[worst]:.2e}", worst, "same" if good else "**wrong**")
    if not good:
        table.fail(operator.name, by(sizes), f"{worst}: error {errors[worst]:.2e}")


def _tail_alone(
    problem: Problem,
    leaves: dict[str, Tensor | None],
    douts: dict[str, Tensor],
    cut: Callable[[Tensor], Tensor],
    by_row: bool,
    length: int,
) -> dict[str, Tensor]:
    """Results of the last rows or tokens alone, after the state that the tokens before leave."""
    per_token = problem.per_token
    part = {name: t if t is None or name not in per_token else cut(t.detach()) for name, t in leaves.items()}
    if "initial_state" in leaves and not by_row:
        before = [t if t is None or n not in per_token else t.detach()[:, :-length] for n, t in leaves.items()]
        with torch.no_grad():
            part["initial_state"] = problem.call("triton", *before)[problem.outputs.index("final_state")].clone()
    part = dict(zip(part, leaves_of(list(part.values())), strict=True))
    outputs = problem.call("triton", *part.values())
    dtail = [d if name == "final_state" and not by_row else cut(d) for name, d in douts.items()]
    grads = gradients(outputs, list(part.values()), tuple(dtail))
    given = [name for name, leaf in part.items() if leaf is not None]
    found = {f"d{name}": grad for name, grad in zip(given, grads, strict=True) if name in per_token}
    return dict(zip(problem.outputs, outputs, strict=True)) | found


def launches(settings: Settings) -> list[Table]:
    """How many kernels a call launches."""
    table = Table(
        "Launches a call",
        ("operator", "sizes", "forward", "backward", "all on the card, forward", "backward", "verdict"),
        f"Own kernels, and everything the card does for the call (copies, fills and sums of PyTorch included). "
        f"The limit for {SSD.name} at 1,024 tokens is {LAUNCH_LIMITS[0]} and {LAUNCH_LIMITS[1]}.",
    )
    dtype = "fp32" if settings.dry else "bf16"
    small = SSD.dry if settings.dry else (1, 1024, 24, 64, 1, 128)
    cases = [(SSD, small, LAUNCH_LIMITS)]
    if not settings.dry:
        cases.append((SSD, (1, 1024, 64, 64, 1, 128), LAUNCH_LIMITS))
    for operator in OPERATORS:
        cases += [(operator, sizes, None) for sizes in ((operator.dry,) if settings.dry else operator.timed)]
    for operator, sizes, limits in cases:
        with table.guarded(operator.name, by(sizes)):
            own, everything = _count(settings, settings.make(operator, dtype, sizes, everything=False))
            kept = limits is None or all(n <= limit for n, limit in zip(own, limits, strict=True))
            verdict = "" if limits is None else "within the limit" if kept else "**too many**"
            table.add(operator.name, by(sizes), *own, *everything, verdict)
            if not kept:
                table.fail(operator.name, by(sizes), f"launches {own}, allowed {limits}")
    return [table]


def _count(settings: Settings, problem: Problem) -> tuple[tuple[int, int], tuple[object, object]]:
    """Own launches forward and backward, and all that the card is given to do."""
    from headrace.kernels.launch import record_launches

    leaves = leaves_of(list(problem.tensors.values()))

    def forward() -> Outputs:
        return problem.call("triton", *leaves)[: problem.trained]

    # Recordings belong to a thread: the backward pass has to stay in this one.
    with torch.autograd.set_multithreading_enabled(False):
        with record_launches() as recorded:
            outputs = forward()
        douts = output_gradients(outputs)
        with record_launches() as recorded_backward:
            gradients(outputs, leaves, douts, again=True)
        own = len(recorded), len(recorded_backward)
        if settings.device == "cpu":
            return own, ("", "")
        return own, (_on_card(forward), _on_card(lambda: gradients(outputs, leaves, douts, again=True)))


def _on_card(call: Callable[[], object]) -> int:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiled.events())


COLD_START = """
import time
begun = time.perf_counter()
import torch
device, dtype, sizes = {device!r}, {dtype}, {sizes}
torch.zeros(1, device=device).item()
started = time.perf_counter()
from headrace.kernels import ssd_scan
imported = time.perf_counter()
B, L, H, P, G, N = sizes
x = torch.randn(B, L, H, P, device=device, dtype=dtype, requires_grad=True)
keys, queries = (torch.randn(B, L, G, N, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
dt, A, D = torch.rand(B, L, H, device=device), -torch.rand(H, device=device), torch.rand(H, device=device)
y, _ = ssd_scan(x, dt, A, keys, queries, D, backend="triton")
y.sum().backward()
x.grad.sum().item()
print(started - begun, imported - started, time.perf_counter() - imported)
"""


def cold_start(settings: Settings) -> list[Table]:
    """Seconds from a fresh process to the first gradients, with no compiled kernel in the cache and with all."""
    table = Table(
        "Cold start, seconds",
        (
            "cache",
            "PyTorch and the card",
            "import headrace",
            "first SSD forward and backward",
            "both",
            "process",
            "goal",
        ),
        "The goal is for what Headrace adds: its import, with Triton's, and the first forward and backward pass.",
    )
    dtype = settings.dtypes["fp32" if settings.dry else "bf16"]
    sizes = SSD.dry if settings.dry else (1, 2048, 24, 64, 1, 128)
    code = COLD_START.format(device=settings.device, dtype=dtype, sizes=sizes)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        for state in ("filled",) if settings.dry else ("PyTorch read once", "empty", "filled"):
            with table.guarded(state):
                if state == "PyTorch read once":  # so that files come from memory, as they do on a machine in use
                    subprocess.run([sys.executable, "-c", "import torch, triton"], check=True, timeout=300)
                    continue
                begun = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
                )
                whole = time.perf_counter() - begun
                if done.returncode:
                    raise RuntimeError(done.stderr[-300:])
                torch_s, import_s, first_s = map(float, done.stdout.split())
                goal = "met" if import_s + first_s <= COLD_START_S else f"missed: {COLD_START_S:.0f} s"
                seconds = (torch_s, import_s, first_s, import_s + first_s, whole)
                table.add(state, *(f"{s:.1f}" for s in seconds), goal)
    return [table]
