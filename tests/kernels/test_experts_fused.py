"""The kernels of expert layers, interpreted."""

from collections.abc import Callable

import pytest
import torch
from expert_choices import chosen, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import expert_order, grouped_linear, permute, unpermute
from headrace.kernels.experts import (
    expert_order_reference,
    grouped_linear_reference,
    permute_reference,
    unpermute_reference,
)
from headrace.kernels.launch import record_launches
from judge import assert_as_exact, poisoned_memory

pytestmark = pytest.mark.interpreted

KINDS = ["uniform", "one expert", "dropped", "nobody"]


def judge_order(experts_Tk: Tensor, X: int) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        actual = expert_order(experts_Tk, X, backend="triton")
    for a, e in zip(actual, expert_order_reference(experts_Tk, X), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
    return actual


def judge_rows(place_Tk: Tensor, S: int, D: int) -> None:
    assert_as_exact(
        lambda x: permute(x, place_Tk, S, backend="triton"),
        lambda x: permute_reference(x, place_Tk, S),
        [normal(len(place_Tk), D)],
    )
    assert_as_exact(
        lambda y, w: unpermute(y, w, place_Tk, backend="triton"),
        lambda y, w: unpermute_reference(y, w, place_Tk),
        [normal(S, D), normal(*place_Tk.shape, seed=2)],
    )


def judge_products(ends_X: Tensor, S: int, O: int, F: int) -> None:  # noqa: E741
    assert_as_exact(
        lambda x, w: grouped_linear(x, w, ends_X, backend="triton"),
        lambda x, w: grouped_linear_reference(x, w, ends_X),
        [normal(S, F), normal(len(ends_X), O, F, seed=2)],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "k", "X"), [(13, 2, 5), (1, 3, 1)])
def test_as_exact_as_the_definitions(kind: str, T: int, k: int, X: int) -> None:
    place_Tk, ends_X = judge_order(chosen(kind, T, k, X), X)
    S = int(ends_X[-1]) + 6
    judge_rows(place_Tk, S, 20)
    judge_products(ends_X, S, 9, 20)


@pytest.mark.parametrize(("T", "k", "X"), [(0, 2, 3), (150, 1, 7), (3, 11, 4)])
def test_no_tokens_and_many(T: int, k: int, X: int) -> None:
    place_Tk, ends_X = judge_order(chosen("dropped", T, k, X), X)
    judge_rows(place_Tk, int(ends_X[-1]), 3)
    judge_products(ends_X, int(ends_X[-1]), 3, 2)


widths = st.integers(1, 33)


@given(st.lists(st.integers(0, 17), min_size=1, max_size=4), st.integers(0, 9), widths, widths)
@settings(max_examples=6)
def test_products_of_any_groups(rows: list[int], spare: int, O: int, F: int) -> None:  # noqa: E741
    ends_X = torch.tensor(rows).cumsum(0).int()
    judge_products(ends_X, int(ends_X[-1]) + spare, O, F)


@pytest.mark.parametrize(("S", "D"), [(0, 5), (7, 0), (7, 1)])
def test_nothing_to_do(S: int, D: int) -> None:
    judge_rows(torch.full((3, 2), -1), S, D)
    judge_products(torch.zeros(2, dtype=torch.int32), S, 4, D)
    none = torch.empty(3, 0, dtype=torch.int64)
    with poisoned_memory():
        assert torch.equal(permute(torch.ones(3, D), none, S, backend="triton"), torch.zeros(S, D))
        assert torch.equal(unpermute(torch.ones(S, D), torch.ones(3, 0), none, backend="triton"), torch.zeros(3, D))


def test_more_experts_than_short_integers() -> None:
    place_Tk, ends_X = expert_order(torch.tensor([[32768], [7], [-1], [32767]]), 32769, backend="triton")
    assert place_Tk.tolist() == [[2], [0], [-1], [1]]
    assert (ends_X[6], ends_X[7], ends_X[32767], ends_X[32768]) == (0, 1, 2, 3)


def test_indices_outside_are_left_out() -> None:
    place_Tk, ends_X = expert_order(torch.tensor([[5, 0], [-7, 1 << 40]]), 5, backend="triton")
    assert place_Tk.tolist() == [[-1, 0], [-1, -1]]
    assert ends_X.tolist() == [1] * 5
    rows = permute(torch.ones(1, 3), torch.tensor([[7, 1]]), 2, backend="triton")
    assert rows.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_nan_stays_with_its_rows() -> None:
    place_Tk = torch.tensor([[0, 1], [-1, 2], [3, -1]])
    y, weight = normal(5, 20).float(), normal(3, 2).float().requires_grad_()
    y[0, 1] = y[4] = float("nan")
    weight.data[1, 0] = float("nan")
    y.requires_grad_()
    out = unpermute(y, weight, place_Tk, backend="triton")
    assert out.isnan().nonzero().tolist() == [[0, 1]]
    dout = torch.ones_like(out)
    dout[1] = float("nan")
    dy, dweight = torch.autograd.grad(out, [y, weight], dout)
    assert dy.isnan().any(1).tolist() == [False, False, True, False, False]
    assert dweight.isnan().tolist() == [[True, False], [False, True], [False, False]]

    maps = normal(2, 3, 20).float().requires_grad_()
    mapped = grouped_linear(y, maps, torch.tensor([2, 4], dtype=torch.int32), backend="triton")
    assert mapped.isnan().any(1).tolist() == [True, False, False, False, False]
    dy, dmaps = torch.autograd.grad(mapped, [y, maps], torch.ones_like(mapped))
    assert not dy.isnan().any()
    assert dmaps.isnan().flatten(1).any(1).tolist() == [True, False]


def layer(x_TD: Tensor, weight_Tk: Tensor, weight_XOD: Tensor, experts_Tk: Tensor) -> Tensor:
    """All four operators in a row; some rows to spare."""
    place_Tk, ends_X = expert_order(experts_Tk, len(weight_XOD), backend="triton")
    rows = permute(x_TD.sin(), place_Tk, experts_Tk.numel() + 3, backend="triton")
    mapped = grouped_linear(rows, weight_XOD, ends_X, backend="triton")
    return unpermute(mapped, weight_Tk, place_Tk, backend="triton")


def results(function: Callable[..., Tensor], tensors: list[Tensor], experts_Tk: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, experts_Tk)
    return [out, *torch.autograd.grad(out.sum(), leaves)]  # of a sum: one number, expanded


def test_one_graph_any_strides_and_the_same_bits() -> None:
    experts_Tk, tensors = chosen("dropped", 12, 2, 3), [normal(12, 8), normal(12, 2), normal(3, 6, 8)]
    tensors = [t.float() for t in tensors]
    views = [t.mT.contiguous().mT for t in tensors]
    usual = results(layer, tensors, experts_Tk)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for others in (
        results(layer, tensors, experts_Tk),
        results(layer, views, experts_Tk.t().contiguous().t()),
        results(compiled, tensors, experts_Tk),
    ):
        assert all(torch.equal(a, b) for a, b in zip(usual, others, strict=True))


def test_pass_opcheck() -> None:
    experts_Tk = chosen("dropped", 6, 2, 3)
    place_Tk, ends_X = expert_order(experts_Tk, 3, backend="triton")
    x, y, weight_Tk, maps = (
        t.float().requires_grad_() for t in (normal(6, 8), normal(14, 8), normal(6, 2), normal(3, 4, 8))
    )
    for operator, arguments in (
        ("expert_order", (experts_Tk, 3, True)),
        ("permute", (x, place_Tk, 14, True)),
        ("unpermute", (y, weight_Tk, place_Tk, True)),
        ("grouped_linear", (y, maps, ends_X, False, True)),
    ):
        torch.library.opcheck(
            getattr(torch.ops.headrace, operator).default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_grids_depend_on_sizes_alone() -> None:
    x, maps = normal(23, 8).float().requires_grad_(), normal(3, 20, 8).float().requires_grad_()
    grids = []
    for ends in ([0, 0, 0], [23, 23, 23], [5, 9, 22]):
        with record_launches() as launches:
            grouped_linear(x, maps, torch.tensor(ends, dtype=torch.int32), backend="triton").sum().backward()
        grids.append([(one.name, one.grid) for one in launches])
    assert grids[0] == grids[1] == grids[2]
    names = ["_grouped_linear_kernel"] * 2 + ["_grouped_weight_gradient_kernel"]
    assert [name for name, _ in grids[0]] == names
    assert grids[0][0][1] == ((23 // 8 + 3 + 1) * 2,)


def test_what_the_kernels_cannot_take_is_named() -> None:
    ends = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="float64 inputs have no Triton path"):
        grouped_linear(normal(2, 3), normal(2, 4, 3), ends, backend="triton")
    huge = torch.empty((1 << 30) + 1, 1, device="meta")
    with pytest.raises(ValueError, match="rows are more than"):
        grouped_linear(huge, torch.empty(2, 1, 1, device="meta"), ends.to("meta"), backend="triton")
