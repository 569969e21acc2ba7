"""The kernels of the causal convolution, interpreted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels import causal_conv1d
from headrace.kernels.conv1d import causal_conv1d_reference
from headrace.kernels.launch import record_launches
from judge import Operator, assert_as_exact, poisoned_memory

pytestmark = pytest.mark.interpreted


def make_inputs(B: int, L: int, D: int, K: int, optional: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, L, D), (D, K), (D,), (B, K - 1, D)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [*tensors] if optional else [*tensors[:2], None, None]


def make_reset(B: int, L: int, share: float | None) -> Tensor | None:
    return None if share is None else torch.rand(B, L, generator=torch.Generator().manual_seed(4)) < share


def operators(activation: str | None, reset: Tensor | None) -> tuple[Operator, Operator]:
    """The kernels and the definition, as functions of the tensors that have gradients."""

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        options = {"activation": activation, "initial_state": state, "reset": reset}
        return causal_conv1d(x, weight, bias, **options, backend="triton")

    return fused, lambda x, weight, bias, state: causal_conv1d_reference(x, weight, bias, activation, state, reset)


@pytest.mark.parametrize(
    ("B", "L", "D", "K", "resets", "activation", "optional"),
    [
        (2, 1, 3, 4, 0.5, "silu", True),
        (1, 63, 40, 4, 0.1, "silu", True),
        (1, 64, 3, 4, None, "silu", True),
        (2, 100, 3, 4, 0.05, "silu", True),
        (2, 100, 3, 4, None, None, False),
        (2, 50, 1, 1, 0.1, "silu", True),
        (1, 33, 3, 2, None, "silu", False),
        (2, 3, 3, 8, 0.2, None, True),
        (1, 7, 3, 8, None, "silu", True),
        (2, 40, 3, 8, 0.2, "silu", True),
        (2, 34, 3, 5, 1.0, "silu", True),
    ],
)
def test_as_exact_as_the_definition(
    B: int, L: int, D: int, K: int, resets: float | None, activation: str | None, optional: bool
) -> None:
    assert_as_exact(*operators(activation, make_reset(B, L, resets)), make_inputs(B, L, D, K, optional))


@pytest.mark.parametrize("result", [0, 1], ids=["y", "final_state"])
def test_one_output_may_have_no_gradient(result: int) -> None:
    fused, definition = operators("silu", make_reset(2, 20, 0.1))
    pair = [lambda *t: fused(*t)[result], lambda *t: definition(*t)[result]]
    assert_as_exact(*pair, make_inputs(2, 20, 3, 4))


def with_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None, dy: Tensor | None = None
) -> list[Tensor]:
    """Outputs of the kernels, then the gradients of all tensors."""
    leaves = [t.detach().float().requires_grad_() if t.is_contiguous() else t for t in (x, weight, bias, state)]
    outputs = operators("silu", reset)[0](*leaves)
    generator = torch.Generator().manual_seed(6)
    douts = [torch.randn(out.shape, generator=generator) for out in outputs]
    grads = torch.autograd.grad(outputs, leaves, [douts[0] if dy is None else dy, douts[1]])
    return [*(out.detach() for out in outputs), *grads]


def test_walks_of_any_length_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, reset = make_inputs(1, 75, 3, 4), make_reset(1, 75, 0.05)
    expected = with_gradients(*inputs, reset)
    assert all(torch.equal(a, e) for a, e in zip(with_gradients(*inputs, reset), expected, strict=True))
    monkeypatch.setattr("headrace.kernels.conv1d.fused._rows_of_program", lambda *sizes: 48)
    y, final_state, dx, dweight, dbias, dinitial = with_gradients(*inputs, reset)
    for actual, same in zip((y, final_state, dx, dinitial), (*expected[:3], expected[5]), strict=True):
        assert torch.equal(actual, same)
    torch.testing.assert_close([dweight, dbias], expected[3:5])


def test_nothing_is_written_beside_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, walls = torch.empty, []

    def walled(shape: tuple[int, ...], **options: object) -> Tensor:
        size = torch.Size(shape).numel()
        memory = empty(size + 400, **options).fill_(7.0)
        walls.extend((memory[:200], memory[200 + size :]))
        return memory[200 : 200 + size].view(shape)

    inputs, reset = make_inputs(2, 35, 34, 4), make_reset(2, 35, 0.05)
    monkeypatch.setattr("headrace.kernels.conv1d.fused.torch.empty", walled)
    with_gradients(*inputs, reset)
    assert len(walls) == 2 * 7
    assert all((wall == 7.0).all() for wall in walls)


def test_nothing_crosses_a_reset_not_even_nan() -> None:
    x, weight, bias, state = make_inputs(1, 40, 3, 4)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[:, [18, 38]] = True
    y, final_state, dx, _, _, _ = with_gradients(x, weight, bias, state, reset)
    broken = x.clone()
    broken[:, :18] = torch.nan
    actual = with_gradients(broken, weight, bias, torch.full_like(state, torch.nan), reset)
    for a, e in zip(actual[:3], (y, final_state, dx), strict=True):
        assert torch.equal(a[:, -22:], e[:, -22:])
    assert actual[3].isnan().all()
    dy = torch.zeros(1, 40, 3)
    dy[:, 18:] = torch.nan
    _, _, dx, _, _, dinitial = with_gradients(x, weight, bias, state, reset, dy)
    assert not dx[:, :18].any()
    assert not dinitial.any()


def test_nan_stays_nan() -> None:
    x, weight, _, _ = (t.float() for t in make_inputs(1, 20, 3, 4))
    x[0, 9, 1] = torch.nan
    y, final_state = causal_conv1d(x, weight, backend="triton")
    assert y.isnan().nonzero().tolist() == [[0, t, 1] for t in range(9, 13)]
    assert not final_state.isnan().any()


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def cut_out(t: Tensor) -> Tensor:
    return torch.cat([t + 1, t, t - 1], -1)[..., t.shape[-1] : 2 * t.shape[-1]]


@pytest.mark.parametrize("view", [transposed, cut_out])
def test_views_give_the_same(view: Callable[[Tensor], Tensor]) -> None:
    x, weight, bias, state = (t.float() for t in make_inputs(2, 35, 3, 4))
    reset = make_reset(2, 35, 0.1)
    expected = with_gradients(x, weight, bias, state, reset)
    views = [view(t).requires_grad_() for t in (x, state)]
    assert not any(t.is_contiguous() for t in views)
    with poisoned_memory():
        actual = with_gradients(views[0], weight, bias, views[1], transposed(reset))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_parameters_may_have_another_dtype() -> None:
    x, weight, bias, state = (t.float() for t in make_inputs(1, 20, 3, 4))
    halves = [t.half().requires_grad_() for t in (weight, bias, state)]
    outputs = causal_conv1d(x, halves[0], halves[1], initial_state=halves[2], backend="triton")
    wholes = [t.detach().float().requires_grad_() for t in halves]
    same = causal_conv1d(x, wholes[0], wholes[1], initial_state=wholes[2], backend="triton")
    grads, expected = (
        torch.autograd.grad([o.sum() for o in outs], leaves) for outs, leaves in ((outputs, halves), (same, wholes))
    )
    assert all(torch.equal(a, e) for a, e in zip(outputs, same, strict=True))
    assert all(torch.equal(a, e.half()) for a, e in zip(grads, expected, strict=True))


def test_one_launch_forward_and_two_backward() -> None:
    with record_launches() as launches:
        with_gradients(*make_inputs(1, 5, 3, 4), None)
    assert [one.name for one in launches] == [
        "_conv1d_forward_kernel",
        "_conv1d_backward_kernel",
        "_conv1d_reduce_kernel",
    ]


def test_opcheck_and_compile() -> None:
    x, weight, bias, state = (t.float().requires_grad_() for t in make_inputs(1, 9, 2, 3))
    reset = make_reset(1, 9, 0.2)
    operator = torch.ops.headrace.causal_conv1d.default
    torch.library.opcheck(operator, (x, weight, bias, state, reset, True, True))
    torch.library.opcheck(operator, (x, weight, None, None, None, False, True))

    def loss_of(x: Tensor) -> Tensor:
        y, final_state = causal_conv1d(x.sin(), weight, bias, initial_state=state, reset=reset, backend="triton")
        return y.square().sum() + final_state.sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(loss_of(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_DK": torch.zeros(3, 9)}, "9 taps, its kernel takes up to 8"),
        ({"x_BLD": torch.zeros(1, 3, 5).mT}, r"x has strides .* give x.contiguous\(\)"),
        ({"initial_state": torch.zeros(1, 3, 3).mT}, "initial_state has strides"),
        ({"x_BLD": torch.zeros(1, 5, 3, dtype=torch.float64)}, "float64 inputs have no Triton path"),
        ({"x_BLD": torch.zeros(1, 5, 3, dtype=torch.int32)}, "x is torch.int32"),
        ({"bias_D": torch.zeros(3, dtype=torch.int64)}, "bias is torch.int64"),
        ({"reset": torch.zeros(1, 5)}, "reset is torch.float32; give a bool mask"),
        ({"reset": torch.zeros(1, 4, dtype=torch.bool)}, "reset has shape"),
        ({"weight_DK": torch.zeros(3, 0)}, "K >= 1"),
        ({"x_BLD": torch.zeros(5, 3)}, r"give \(B, L >= 1, D\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    with record_launches() as launches, pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x_BLD": torch.zeros(1, 5, 3), "weight_DK": torch.zeros(3, 4)} | change), backend="triton")
    assert not launches


def test_backend_reference_is_the_definition() -> None:
    x, weight, bias, state = (t.bfloat16() for t in make_inputs(1, 9, 3, 4))
    y, final_state = causal_conv1d(x, weight.float(), bias, initial_state=state, backend="reference")
    expected, _ = causal_conv1d_reference(x, weight.float(), bias, "silu", state)
    assert y.dtype == final_state.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
