"""The operators of expert layers: their PyTorch path by their definition, bad input, and what compilers see."""

from collections.abc import Callable

import pytest
import torch
from expert_choices import chosen, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from headrace.kernels import expert_order, grouped_linear, permute, unpermute
from headrace.kernels.dispatch import use_backend
from headrace.kernels.experts import (
    expert_order_reference,
    grouped_linear_reference,
    permute_reference,
    unpermute_reference,
)
from judge import poisoned_memory, results_of

KINDS = ["uniform", "one expert", "dropped", "nobody"]


def assert_equals_definition(operator: Callable, reference: Callable, tensors: list[Tensor]) -> None:
    """Outputs and all gradients in float64."""
    with poisoned_memory():
        actual = results_of(operator, tensors, torch.float64)
    for a, e in zip(actual, results_of(reference, tensors, torch.float64), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


sizes = st.integers(0, 9)
problems = st.tuples(st.sampled_from(KINDS), sizes, st.integers(1, 4), st.integers(1, 6), sizes, sizes, sizes)


@given(problems)
@settings(max_examples=60)
def test_equal_their_definitions(problem: tuple) -> None:
    kind, T, k, X, D, O, spare = problem  # noqa: E741
    experts_Tk = chosen(kind, T, k, X)
    place_Tk, ends_X = expert_order(experts_Tk, X)
    for a, e in zip((place_Tk, ends_X), expert_order_reference(experts_Tk, X), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)

    S = int(ends_X[-1]) + spare
    x_TD, y_SD, weight_Tk, weight_XOD = normal(T, D), normal(S, D), normal(T, k), normal(X, O, D)
    assert_equals_definition(lambda x: permute(x, place_Tk, S), lambda x: permute_reference(x, place_Tk, S), [x_TD])
    assert_equals_definition(
        lambda y, w: unpermute(y, w, place_Tk), lambda y, w: unpermute_reference(y, w, place_Tk), [y_SD, weight_Tk]
    )
    assert_equals_definition(
        lambda x, w: grouped_linear(x, w, ends_X),
        lambda x, w: grouped_linear_reference(x, w, ends_X),
        [y_SD, weight_XOD],
    )


def test_rows_are_sorted_by_expert_then_token_then_copy() -> None:
    place_Tk, ends_X = expert_order(torch.tensor([[2, 0], [0, -1], [2, 2], [0, 3]]), 5)
    assert place_Tk.tolist() == [[3, 0], [1, -1], [4, 5], [2, 6]]
    assert ends_X.tolist() == [3, 3, 6, 7, 7]


def test_more_experts_than_short_integers() -> None:
    experts_Tk = torch.tensor([[40000], [7], [-1], [39999]])
    place_Tk, ends_X = expert_order(experts_Tk, 40001)
    assert place_Tk.tolist() == [[2], [0], [-1], [1]]
    assert (ends_X[6], ends_X[7], ends_X[39999], ends_X[40000]) == (0, 1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    k = 64
    place_1k = torch.arange(k)[None]
    y_SD = torch.full((k, 3), 1.0, dtype=dtype).index_fill(0, torch.tensor([0]), 256.0)
    out = unpermute(y_SD, torch.full((1, k), 0.125), place_1k)
    assert out.dtype == dtype
    assert torch.equal(out, torch.full((1, 3), (256 + 63) / 8, dtype=torch.float32).to(dtype))
    x = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(permute(x, place_1k, k), x, y_SD)
    assert torch.equal(dx, torch.full((1, 3), 256 + 63.0).to(dtype))
    y, weight, ends = torch.ones(8, 512, dtype=dtype), torch.full((2, 3, 512), 0.01, dtype=dtype), torch.tensor([3, 8])
    expected = (weight.float()[0, 0] * 1.0).sum().to(dtype)
    torch.testing.assert_close(grouped_linear(y, weight, ends.int()), expected.expand(8, 3))


def test_nan_stays_with_its_rows() -> None:
    place_Tk = torch.tensor([[0, 1], [-1, 2], [3, -1]])
    y = normal(5, 4)
    y[0, 1] = y[4] = float("nan")
    weight = normal(3, 2).requires_grad_()
    y.requires_grad_()
    out = unpermute(y, weight, place_Tk)
    assert out.isnan().nonzero().tolist() == [[0, 1]]
    dout = torch.ones_like(out).index_put((torch.tensor(1),), torch.tensor(float("nan"), dtype=torch.float64))
    dy, dweight = torch.autograd.grad(out, [y, weight], dout)
    assert dy.isnan().any(1).tolist() == [False, False, True, False, False]
    assert dweight.isnan().tolist() == [[True, False], [False, True], [False, False]]

    x = normal(3, 4).index_fill(0, torch.tensor([0]), float("nan")).requires_grad_()
    rows = permute(x, place_Tk, 5)
    assert rows.isnan().any(1).tolist() == [True, True, False, False, False]
    (dx,) = torch.autograd.grad(rows, x, y.detach())
    assert dx.isnan().any(1).tolist() == [True, False, False]

    maps = normal(2, 3, 4).requires_grad_()
    mapped = grouped_linear(y, maps, torch.tensor([2, 4], dtype=torch.int32))
    assert mapped.isnan().any(1).tolist() == [True, False, False, False, False]
    dy, dmaps = torch.autograd.grad(mapped, [y, maps], torch.ones_like(mapped))
    assert not dy.isnan().any()
    assert dmaps.isnan().flatten(1).any(1).tolist() == [True, False]


def test_only_the_gradients_asked_for() -> None:
    x, weight, ends = normal(6, 4).requires_grad_(), normal(2, 3, 4).requires_grad_(), torch.tensor([2, 6]).int()
    both = torch.autograd.grad(grouped_linear(x, weight, ends).square().sum(), [x, weight])
    (dx,) = torch.autograd.grad(grouped_linear(x, weight.detach(), ends).square().sum(), x)
    (dweight,) = torch.autograd.grad(grouped_linear(x.detach(), weight, ends).square().sum(), weight)
    assert torch.equal(dx, both[0])
    assert torch.equal(dweight, both[1])


def layer(x_TD: Tensor, weight_Tk: Tensor, weight_XOD: Tensor, experts_Tk: Tensor, backend: str = "auto") -> Tensor:
    """All four operators in a row; some rows to spare."""
    place_Tk, ends_X = expert_order(experts_Tk, len(weight_XOD), backend=backend)
    rows = permute(x_TD.sin(), place_Tk, experts_Tk.numel() + 3, backend=backend)
    return unpermute(grouped_linear(rows, weight_XOD, ends_X, backend=backend), weight_Tk, place_Tk, backend=backend)


def layer_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in (normal(20, 8), normal(20, 2), normal(5, 6, 8))]


def test_compile_as_one_graph_and_repeat_bit_for_bit() -> None:
    experts_Tk, tensors = chosen("dropped", 20, 2, 5), layer_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (layer, layer, compiled):
        out = function(*tensors, experts_Tk)
        runs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for usual, again, other in zip(*runs, strict=True):
        assert torch.equal(usual, again)
        torch.testing.assert_close(other, usual)


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    experts_Tk, tensors = chosen("dropped", 20, 2, 5), layer_inputs()
    real = layer(*tensors, experts_Tk)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        fake = layer(*fakes, mode.from_tensor(experts_Tk))
        grads = torch.autograd.grad(fake.sum(), fakes)
        order = expert_order(mode.from_tensor(experts_Tk), 5)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert [(t.shape, t.dtype) for t in order] == [((20, 2), torch.int64), ((5,), torch.int32)]
    place_Tk, ends_X = expert_order(experts_Tk.to("meta"), 5)
    assert (place_Tk.device.type, ends_X.device.type) == ("meta", "meta")


def test_pass_opcheck() -> None:
    experts_Tk, (x, weight_Tk, weight_XOD) = chosen("dropped", 20, 2, 5), layer_inputs()
    place_Tk, ends_X = expert_order(experts_Tk, 5)
    y = normal(43, 8).float().requires_grad_()
    for operator, arguments in (
        ("expert_order", (experts_Tk, 5, False)),
        ("permute", (x, place_Tk, 43, False)),
        ("unpermute", (y, weight_Tk, place_Tk, False)),
        ("grouped_linear", (y, weight_XOD, ends_X, False, False)),
    ):
        torch.library.opcheck(getattr(torch.ops.headrace, operator).default, arguments)


def test_views_and_expanded_gradients_are_taken() -> None:
    experts_Tk = chosen("uniform", 20, 2, 5).t().contiguous().t()
    x, weight_Tk, weight_XOD = (t.detach() for t in layer_inputs(torch.float64))
    views = [x.t().contiguous().t(), weight_Tk.t().contiguous().t(), weight_XOD.mT.contiguous().mT]
    assert not any(view.is_contiguous() for view in views)
    results = []
    for tensors in (views, [x, weight_Tk, weight_XOD]):
        leaves = [t.requires_grad_() for t in tensors]
        out = layer(*leaves, experts_Tk)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])  # of a sum: one number, expanded
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_the_definition_as_backend() -> None:
    experts_Tk, tensors = chosen("dropped", 20, 2, 5), layer_inputs(torch.float64)
    with use_backend("reference"):
        expected = layer(*tensors, experts_Tk)
    torch.testing.assert_close(layer(*tensors, experts_Tk, backend="reference"), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(*tensors, experts_Tk), expected, rtol=1e-12, atol=1e-12)


def test_bad_arguments_are_named() -> None:
    x, y, weight, place = torch.randn(3, 4), torch.randn(6, 4), torch.randn(3, 2), torch.arange(6).view(3, 2)
    maps, ends = torch.randn(2, 5, 4), torch.tensor([3, 6], dtype=torch.int32)
    for call, message in (
        (lambda: expert_order(place.int(), 6), r"experts are torch\.int32 of shape \(3, 2\); give torch\.int64"),
        (lambda: expert_order(place.flatten(), 6), r"shape \(6,\)"),
        (lambda: expert_order(place, 0), "num_experts=0 is not positive"),
        (lambda: expert_order(place, 6, backend="cuda"), "backend='cuda' is not known"),
        (lambda: permute(x, place[:2], 6), "x has 3 tokens and place 2"),
        (lambda: permute(x, place, -1), "num_rows=-1 is negative"),
        (lambda: permute(x.int(), place, 6), r"x is torch\.int32"),
        (lambda: permute(x, place.int(), 6), r"place is torch\.int32"),
        (lambda: permute(x[0], place, 6), "two dimensions each"),
        (lambda: permute(x.to("meta"), place, 6), "x is on meta and place is on cpu"),
        (lambda: unpermute(y, weight[:2], place), r"weight is \(2, 2\) on cpu and place is \(3, 2\)"),
        (lambda: unpermute(y, weight.double(), place), r"weight is torch\.float64 .* give torch\.float32"),
        (lambda: unpermute(y.double(), weight, place), r"give torch\.float64"),
        (lambda: grouped_linear(y, maps[:1], ends), r"\(\(6, 4\), \(1, 5, 4\), \(2,\)\); give"),
        (lambda: grouped_linear(y, maps[:, :, :3], ends), "give"),
        (lambda: grouped_linear(y, maps[:0], ends[:0]), "X > 0"),
        (lambda: grouped_linear(y, maps.double(), ends), "one float dtype"),
        (lambda: grouped_linear(y, maps, ends.long()), r"torch\.int64; give one float dtype, and torch\.int32"),
        (lambda: grouped_linear(y, maps, ends.to("meta")), "give one device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_indices_outside_are_named_on_a_cpu() -> None:
    x, y, place = torch.randn(3, 4), torch.randn(6, 4), torch.arange(6).view(3, 2)
    maps = torch.randn(2, 5, 4)
    for call, message in (
        (lambda: expert_order(place, 5), "experts hold 5; give 0 to 4"),
        (lambda: expert_order(place - 2, 5), "experts hold -2; give 0 to 4"),
        (lambda: permute(x, place, 5), "place holds 5; give 0 to 4"),
        (lambda: permute(x, place - 2, 6), "place holds -2"),
        (lambda: unpermute(y[:5], torch.ones(3, 2), place), "place holds 5"),
        (lambda: grouped_linear(y, maps, torch.tensor([4, 3]).int()), "ends are"),
        (lambda: grouped_linear(y, maps, torch.tensor([4, 7]).int()), "ends are"),
        (lambda: grouped_linear(y, maps, torch.tensor([-1, 6]).int()), "ends are"),
    ):
        with pytest.raises(IndexError, match=message):
            call()
