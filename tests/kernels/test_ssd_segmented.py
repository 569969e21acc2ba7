"""SSD cut into segments anywhere equals the uncut scan: outputs and all gradients, resets, any lengths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import ssd_scan
from headrace.kernels.affine import SCALAR
from headrace.kernels.ssd import ssd_reference
from headrace.kernels.ssd.segmented import ssd_segments
from judge import assert_as_exact


class InOrder:
    """The exchange of a process that holds every segment."""

    def __init__(self, M: list[Tensor], S: list[Tensor], done: bool) -> None:
        self.M, self.S, self.done = M, S, done

    def wait(self) -> list[Tensor | None]:
        arriving: list[Tensor | None] = []
        state: Tensor | None = None
        for m, s in zip(self.M, self.S, strict=True):
            arriving.append(state)
            state = s if state is None else SCALAR.apply(m, state) + s
        return arriving


class LocalExchange:
    """Starts `InOrder`, or in reverse; `done` at once, or as one that is under way."""

    def __init__(self, done: bool) -> None:
        self.done = done

    def start(self, M: list[Tensor], S: list[Tensor], *, reverse: bool = False) -> "InOrder | Reversed":
        return Reversed(M[::-1], S[::-1], self.done) if reverse else InOrder(M, S, self.done)


class Reversed(InOrder):
    def wait(self) -> list[Tensor | None]:
        return super().wait()[::-1]


def draw_inputs(L: int, H: int, G: int, seed: int, dtype: torch.dtype, D: str) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    skip = {"head": (H,), "channel": (H, 3)}.get(D)
    values = [normal(2, L, H, 3), normal(2, L, H).abs(), -normal(H).abs(), normal(2, L, G, 5), normal(2, L, G, 5)]
    values.append(normal(*skip) if skip else None)  # type: ignore[arg-type]
    return tuple(None if v is None else v.to(dtype).requires_grad_() for v in values)


def with_gradients(inputs: tuple[Tensor | None, ...], y: Tensor) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    wanted = [v for v in inputs if v is not None]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), wanted)]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[slice]]:
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return bounds[-1], [slice(a, b) for a, b in pairwise(bounds)]


@given(cuts(), st.sampled_from([(4, 1), (4, 2), (3, 3)]), st.integers(1, 40), st.integers(0, 99), st.booleans())
@settings(max_examples=30)
def test_any_cut_equals_the_whole(
    cut: tuple[int, list[slice]], heads: tuple[int, int], chunk_size: int, seed: int, packed: bool
) -> None:
    L, segments = cut
    inputs = draw_inputs(L, *heads, seed, torch.float64, ("head", "channel", "none")[seed % 3])
    reset = torch.rand(2, L, generator=torch.Generator().manual_seed(seed)) < 0.05 if packed else None
    whole, _ = ssd_scan(*inputs, chunk_size=chunk_size, reset=reset)  # type: ignore[arg-type]
    exchange = LocalExchange(done=seed % 2 == 0)
    options = {"segments": segments, "exchange": exchange, "reset": reset, "chunk_size": chunk_size}
    parts = ssd_segments(*inputs, **options)  # type: ignore[arg-type]
    for a, b in zip(with_gradients(inputs, parts), with_gradients(inputs, whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_the_recurrence(dtype: torch.dtype, done: bool) -> None:
    """Against float64, the error of the cut scan is at most twice that of the recurrence in the same dtype."""
    given_inputs = draw_inputs(300, 4, 2, 1, dtype, "head")
    exact_inputs = tuple(None if v is None else v.detach().double().requires_grad_() for v in given_inputs)
    exact = with_gradients(exact_inputs, ssd_scan(*exact_inputs)[0])  # type: ignore[arg-type]
    whole = with_gradients(given_inputs, ssd_scan(*given_inputs, backend="reference")[0])  # type: ignore[arg-type]
    segments = [slice(0, 100), slice(100, 137), slice(137, 300)]
    cut = with_gradients(
        given_inputs,
        ssd_segments(*given_inputs, segments=segments, exchange=LocalExchange(done)),  # type: ignore[arg-type]
    )
    for e, w, c in zip(exact, whole, cut, strict=True):
        assert (c.double() - e).norm() <= 2 * (w.double() - e).norm() + 1e-12


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("lengths", [(40,), (17, 1, 30)], ids=str)
def test_segments_in_triton(lengths: tuple[int, ...]) -> None:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = [slice(a, b) for a, b in pairwise(bounds)]
    reset = torch.rand(2, bounds[-1], generator=torch.Generator().manual_seed(1)) < 0.05
    exchange = LocalExchange(done=True)

    def cut(*inputs: Tensor) -> Tensor:
        return ssd_segments(*inputs, segments=segments, exchange=exchange, reset=reset, backend="triton")

    assert_as_exact(
        cut, lambda *t: ssd_reference(*t, reset=reset)[0], draw_inputs(bounds[-1], 4, 2, 3, torch.float64, "head")
    )
