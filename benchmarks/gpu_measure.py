"""What the GPU benchmarks share: tables, runs with fixed output gradients, errors, and times by the card's clock."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_operators import Outputs

# More than any card's last cache.
FLUSHED_BYTES = 512 << 20


@dataclass
class Table:
    """A part's Markdown table, and what went wrong in it."""

    title: str
    columns: tuple[str, ...]
    notes: str = ""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Append a row; missing cells stay empty."""
        texts = [str(cell).replace("|", "/").replace("\n", " ") for cell in cells]
        self.rows.append((*texts, *[""] * (len(self.columns) - len(texts))))

    @contextmanager
    def guarded(self, *cells: object) -> Iterator[None]:
        """Turn an exception into a row of its own, which begins with `cells`, and a failure."""
        try:
            yield
        except Exception as error:  # whatever went wrong is a result
            traceback.print_exc()
            message = f"{type(error).__name__}: {str(error)[:300]}"
            self.add(*cells, f"**{message}**")
            self.fail(*cells, message)

    def fail(self, *words: object) -> None:
        """Note what is wrong."""
        self.failures.append(" ".join(map(str, words)).replace("\n", " "))

    def text(self) -> str:
        """The table as Markdown."""
        lines = [f"## {self.title}", ""]
        lines += [self.notes, ""] if self.notes else []
        lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += ["", *(f"- **failed**: {failure}" for failure in self.failures)]
        return "\n".join(lines).rstrip() + "\n"


def leaves_of(tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Copies that ask for gradients, in `dtype` unless None."""
    return [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def output_gradients(outputs: Outputs, seed: int = 5) -> Outputs:
    """Normal values for each output, the same ones for the same shapes and dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)

    def draw(out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)

    return tuple(draw(out) for out in outputs)


def gradients(outputs: Outputs, leaves: Sequence[Tensor | None], douts: Outputs, *, again: bool = False) -> Outputs:
    """Gradients of the leaves that are not None; with `again`, they may be asked for once more."""
    given = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(outputs, given, douts, retain_graph=again, allow_unused=True, materialize_grads=True)


def run(
    call: Callable[..., Outputs],
    tensors: Sequence[Tensor | None],
    douts: Outputs | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Outputs, Outputs, Outputs]:
    """Outputs, gradients and output gradients of `call(*tensors)`; `douts` are drawn unless given."""
    leaves = leaves_of(tensors, dtype)
    outputs = call(*leaves)
    drawn = output_gradients(outputs) if douts is None else douts
    cast = tuple(d.to(out.dtype) for d, out in zip(drawn, outputs, strict=True))
    grads = gradients(outputs, leaves, cast)
    return tuple(out.detach() for out in outputs), grads, drawn


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """`|actual - exact| / |exact|`, NaN where either holds NaN, plain where `exact` is zero."""
    actual, exact = actual.double(), exact.double()
    size = exact.norm()
    return ((actual - exact).norm() / torch.where(size == 0, 1.0, size)).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@dataclass
class Timed:
    """Medians of a call: microseconds of the card, and of the host until everything was under way."""

    device: float
    host: float


def interleaved(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timed]:
    """Time the calls in turns, `rounds` times after two rounds of warm-up. On a CPU, once each.

    Before each call the caches are flushed and the card is kept busy, so that the host is ahead of it: what is timed is
    the card's work. Where the host takes longer than the card waits, its time shows in both figures.
    """
    if device == "cpu":
        return {name: _on_host(call) for name, call in calls.items()}
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = list(calls)
    for number in range(rounds + 2):
        for name in order:
            timed = _on_card(calls[name], flushed)
            if number >= 2:
                times[name].append(timed)
        order = order[1:] + order[:1]
    return {
        name: Timed(statistics.median(t[0] for t in values), statistics.median(t[1] for t in values))
        for name, values in times.items()
    }


def _on_host(call: Callable[[], object]) -> Timed:
    start = time.perf_counter()
    call()
    elapsed = (time.perf_counter() - start) * 1e6
    return Timed(elapsed, elapsed)


def _on_card(call: Callable[[], object], flushed: Tensor) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flushed.zero_()
    torch.cuda._sleep(10_000_000)  # about five milliseconds
    start.record()
    begun = time.perf_counter()
    call()
    host = (time.perf_counter() - begun) * 1e6
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3, host
