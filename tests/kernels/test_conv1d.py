"""The causal convolution: against its definition, across cuts and resets, and inside PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from headrace.kernels import causal_conv1d, numerics
from headrace.kernels.conv1d import causal_conv1d_reference


def make_inputs(
    B: int, L: int, D: int, K: int, *, seed: int = 0, optional: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, L, D), (D, K), (D,), (B, K - 1, D)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors[: 4 if optional else 2]] + [None] * (0 if optional else 2)


def gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    leaves = [t for t in inputs if t is not None]
    return [*torch.autograd.grad(outputs, leaves, douts, allow_unused=True, materialize_grads=True)]


def random_reset(B: int, L: int, seed: int, share: float) -> Tensor:
    return torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < share


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 15, 16, 17, 40]),
    st.sampled_from([1, 3, 5000]),
    st.integers(1, 5),
    st.sampled_from([None, 0.05, 0.5, 1.0]),
    st.sampled_from(["silu", None]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_equals_definition_in_float64(
    B: int, L: int, D: int, K: int, resets: float | None, activation: str | None, optional: bool, seed: int
) -> None:
    inputs = make_inputs(B, L, D, K, seed=seed, optional=optional)
    reset = None if resets is None else random_reset(B, L, seed, resets)
    x, weight, bias, state = inputs
    actual = causal_conv1d(x, weight, bias, activation=activation, initial_state=state, reset=reset)
    expected = causal_conv1d_reference(x, weight, bias, activation, state, reset)
    pairs = zip([*actual, *gradients(actual, inputs)], [*expected, *gradients(expected, inputs)], strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("K", [4, 20])
def test_smallest_blocks_equal_definition(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "BLOCK_ELEMENTS", 1)
    inputs = make_inputs(2, 70, 3, K)
    x, weight, bias, state = inputs
    reset = random_reset(2, 70, 1, 0.05)
    actual = causal_conv1d(x, weight, bias, initial_state=state, reset=reset)
    expected = causal_conv1d_reference(x, weight, bias, "silu", state, reset)
    pairs = zip([*actual, *gradients(actual, inputs)], [*expected, *gradients(expected, inputs)], strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_equals_torch_conv1d() -> None:
    x, weight, bias, _ = make_inputs(2, 30, 6, 4)
    y, final_state = causal_conv1d(x, weight, bias)
    theirs = F.silu(F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :30]).transpose(1, 2)
    torch.testing.assert_close(y, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(final_state, x[:, -3:])


@pytest.mark.parametrize("cut", [1, 2, 17, 39])
def test_two_parts_joined_by_the_state_equal_the_whole(cut: int) -> None:
    inputs = make_inputs(2, 40, 3, 4)
    x, weight, bias, state = inputs
    reset = random_reset(2, 40, 5, 0.1)
    whole = causal_conv1d(x, weight, bias, initial_state=state, reset=reset)
    first, between = causal_conv1d(x[:, :cut], weight, bias, initial_state=state, reset=reset[:, :cut])
    second, last = causal_conv1d(x[:, cut:], weight, bias, initial_state=between, reset=reset[:, cut:])
    parts = torch.cat([first, second], 1), last
    pairs = zip([*parts, *gradients(parts, inputs)], [*whole, *gradients(whole, inputs)], strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", None])
def test_inputs_and_output_gradients_are_left_alone(activation: str | None) -> None:
    inputs = make_inputs(2, 40, 3, 4)
    x, weight, bias, state = inputs
    outputs = causal_conv1d(
        x, weight, bias, activation=activation, initial_state=state, reset=random_reset(2, 40, 5, 0.1)
    )
    values = [*inputs, *(torch.ones_like(output) for output in outputs)]
    before = [value.detach().clone() for value in values]
    torch.autograd.grad(outputs, inputs, values[-2:])
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_nothing_crosses_a_reset_not_even_nan() -> None:
    x, weight, bias, state = (t.detach() for t in make_inputs(1, 40, 3, 4))
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[:, 37] = True
    y, final_state = causal_conv1d(x, weight, bias, initial_state=state, reset=reset)
    x_broken = x.clone()
    x_broken[:, :37] = torch.nan
    y_broken, final_broken = causal_conv1d(x_broken, weight, bias, initial_state=state, reset=reset)
    assert torch.equal(y[:, 37:], y_broken[:, 37:])
    assert torch.equal(final_state, final_broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 40, 8, 4, dtype=dtype)
    x, weight, bias, state = inputs
    y, final_state = causal_conv1d(x, weight, bias, initial_state=state)
    exact, _ = causal_conv1d(x.double(), weight.double(), bias.double(), initial_state=state.double())
    assert y.dtype == final_state.dtype == dtype
    assert ((y - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    assert all(grad.dtype == dtype for grad in gradients((y, final_state), inputs))


def test_float32_error_at_most_twice_the_definitions() -> None:
    inputs = make_inputs(2, 200, 16, 4, dtype=torch.float32)
    x, weight, bias, state = inputs
    fast = causal_conv1d(x, weight, bias, initial_state=state)
    plain = causal_conv1d_reference(x, weight, bias, "silu", state)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = causal_conv1d_reference(wide[0], wide[1], wide[2], "silu", wide[3])
    results = [[*out, *gradients(out, leaves)] for out, leaves in ((fast, inputs), (plain, inputs), (exact, wide))]
    for a, r, e in zip(*results, strict=True):
        assert (a - e).norm() <= 2 * (r - e).norm()


def test_opcheck_and_compile() -> None:
    x, weight, bias, state = make_inputs(2, 20, 3, 4, dtype=torch.float32)
    operator = torch.ops.headrace.causal_conv1d.default
    reset = random_reset(2, 20, 2, 0.2)
    torch.library.opcheck(operator, (x, weight, bias, state, reset, True, False))
    torch.library.opcheck(operator, (x, weight, None, None, None, False, False))

    def loss_of(x: Tensor) -> Tensor:
        y, final_state = causal_conv1d(torch.sin(x), weight, bias, initial_state=state, reset=reset)
        return y.square().sum() + final_state.sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(loss_of(x), x)
    torch.testing.assert_close(actual, expected)


def test_checkpointed_gradients_are_bit_identical() -> None:
    x, weight, bias, _ = make_inputs(1, 20, 3, 4)
    y, _ = torch.utils.checkpoint.checkpoint(causal_conv1d, x, weight, bias, use_reentrant=False)
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, torch.autograd.grad(causal_conv1d(x, weight, bias)[0].sum(), x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"weight_DK": torch.zeros(2, 4)}, r"give \(B, L >= 1, D\)"),
        ({"bias_D": torch.zeros(2)}, "bias has shape"),
        ({"initial_state": torch.zeros(1, 4, 3)}, "initial_state has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    x, weight, _, _ = make_inputs(1, 5, 3, 4)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x_BLD": x, "weight_DK": weight} | change))
