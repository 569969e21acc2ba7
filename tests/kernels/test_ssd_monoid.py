"""Summaries of stretches: they form a monoid, and say what the scan does to a state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import compose, ssd_scan, ssd_summary


def make_inputs(L: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [normal(2, L, 4, 3), normal(2, L, 4).abs(), -normal(4).abs(), normal(2, L, 2, 5), normal(2, L, 2, 5)]


def summary(inputs: list[Tensor], part: slice, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    x, dt, A, B, _ = inputs
    return ssd_summary(x[:, part], dt[:, part], A, B[:, part], reset=None if reset is None else reset[:, part])


def assert_same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=25, deadline=None)
def test_compose_is_associative_and_joins_stretches(seed: int, a: int, b: int, c: int, with_reset: bool) -> None:
    inputs = make_inputs(a + b + c, seed)
    reset = None
    if with_reset:
        reset = torch.rand(2, a + b + c, generator=torch.Generator().manual_seed(seed)) < 0.03
    first, second, third = (summary(inputs, s, reset) for s in (slice(a), slice(a, a + b), slice(a + b, None)))
    whole = summary(inputs, slice(None), reset)
    assert_same(compose(third, compose(second, first)), whole)
    assert_same(compose(compose(third, second), first), whole)


def test_bad_arguments_are_named() -> None:
    x, dt, A, B, _ = make_inputs(5)
    with pytest.raises(ValueError, match="chunk_size=0"):
        ssd_summary(x, dt, A, B, chunk_size=0)
    with pytest.raises(ValueError, match="dt has shape"):
        ssd_summary(x, dt[:, :3], A, B)


def test_unit() -> None:
    element = summary(make_inputs(10), slice(None), None)
    unit = torch.ones_like(element[0]), torch.zeros_like(element[1])
    assert_same(compose(element, unit), element)
    assert_same(compose(unit, element), element)


@pytest.mark.parametrize("reset_at", [None, 0, 40])
def test_summary_predicts_the_final_state_with_its_gradients(reset_at: int | None) -> None:
    inputs = make_inputs(80)
    reset = None
    if reset_at is not None:
        reset = torch.zeros(2, 80, dtype=torch.bool)
        reset[:, reset_at] = True
    state = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [t.requires_grad_() for t in (*inputs[:4], state)]
    _, final_state = ssd_scan(*inputs, initial_state=state, reset=reset)
    M_BH, S_BHPN = ssd_summary(*inputs[:4], reset=reset)
    predicted = M_BH[..., None, None] * state + S_BHPN
    torch.testing.assert_close(predicted, final_state, rtol=1e-10, atol=1e-12)
    if reset_at is not None:
        assert M_BH.count_nonzero() == 0
    gradient = torch.randn(final_state.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.autograd.grad(final_state, leaves, gradient)
    for actual, grad in zip(torch.autograd.grad(predicted, leaves, gradient), expected, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-10, atol=1e-12)
