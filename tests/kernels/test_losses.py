"""Linear cross-entropy in chunks: against its definition, and the memory it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.kernels import linear_cross_entropy
from headrace.kernels.losses import linear_cross_entropy_reference
from headrace.kernels.losses.chunked import linear_cross_entropy_forward


def make_inputs(
    T: int, D: int, V: int, *, seed: int = 0, ignored: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target_T = torch.randint(V, (T,), generator=generator)
    target_T[torch.rand(T, generator=generator) < ignored] = -100
    return x_TD, weight_VD, target_T


@given(
    st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.integers(1, 25), st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 1e-2]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_equals_definition_in_float64(
    T: int, D: int, V: int, chunk_size: int, ignored: float, z_loss: float, seed: int
) -> None:
    x, weight, target = make_inputs(T, D, V, seed=seed, ignored=ignored)
    loss, count = linear_cross_entropy(x, weight, target, chunk_size=chunk_size, z_loss=z_loss)
    expected, expected_count = linear_cross_entropy_reference(x, weight, target, z_loss=z_loss)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert count == expected_count
    grads = torch.autograd.grad(loss * 3, (x, weight))
    for a, e in zip(grads, torch.autograd.grad(expected * 3, (x, weight)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_another_ignore_index_and_default_chunks() -> None:
    x, weight, target = make_inputs(300, 4, 17000)
    target = target.masked_fill(target == -100, 5)
    loss, count = linear_cross_entropy(x, weight, target, ignore_index=5)
    expected, expected_count = linear_cross_entropy_reference(x, weight, target, ignore_index=5)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert count == expected_count == (target != 5).sum()


def test_gradient_only_where_asked() -> None:
    x, weight, target = make_inputs(10, 3, 5)
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), target)[0], x)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, target)[0], weight)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, target)[0], (x, weight))
    assert torch.equal(dx, both[0])
    assert torch.equal(dweight, both[1])
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, target)[0].requires_grad


def test_huge_logits_stay_finite() -> None:
    x, weight, target = make_inputs(10, 3, 5, dtype=torch.float32)
    loss, _ = linear_cross_entropy(x * 1e4, weight, target)
    expected, _ = linear_cross_entropy_reference(x * 1e4, weight, target)
    torch.testing.assert_close(loss, expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, weight)))


def test_float32_error_at_most_twice_the_definitions() -> None:
    x, weight, target = make_inputs(200, 16, 50, dtype=torch.float32)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(linear_cross_entropy_reference(*wide, target)[0], wide)
    plain = torch.autograd.grad(linear_cross_entropy_reference(x, weight, target)[0], (x, weight))
    fast = torch.autograd.grad(linear_cross_entropy(x, weight, target, chunk_size=64)[0], (x, weight))
    for a, r, e in zip(fast, plain, exact, strict=True):
        assert (a - e).norm() <= 2 * (r - e).norm()


def test_bfloat16_sums_in_float32() -> None:
    x, weight, target = make_inputs(200, 16, 50, dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(x, weight, target, chunk_size=64)
    exact, _ = linear_cross_entropy_reference(x.double(), weight.double(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=5e-3, atol=0)
    grads = torch.autograd.grad(loss, (x, weight))
    for a, e in zip(grads, torch.autograd.grad(exact, (x, weight)), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - e).float().norm() <= 2e-2 * e.float().norm()


def test_bfloat16_gradients_are_scaled_exactly() -> None:
    x, weight, target = make_inputs(20, 8, 50, dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(x, weight, target)
    plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * (1 / 771), (x, weight))
    for a, e in zip(scaled, plain, strict=True):
        assert torch.equal(a, (e.float() * torch.tensor(1 / 771)).bfloat16())


def test_no_tensor_as_large_as_all_logits() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                largest = max(largest, value.numel() if isinstance(value, Tensor) else 0)
            return result

    x, weight, target = (t.detach() for t in make_inputs(400, 4, 300))
    with Largest():
        linear_cross_entropy_forward(x, weight, target, -100, 50, 0.0, True, True)
    assert largest == 50 * 300


def test_opcheck_and_compile() -> None:
    x, weight, target = make_inputs(10, 3, 5, dtype=torch.float32)
    operator = torch.ops.headrace.linear_cross_entropy.default
    torch.library.opcheck(operator, (x, weight, target, -100, 4, 1e-3, True, True, False))
    torch.library.opcheck(operator, (x.detach(), weight.detach(), target, -100, 4, 0.0, False, False, False))

    def loss_of(x: Tensor, weight: Tensor) -> Tensor:
        loss_sum, num_targets = linear_cross_entropy(torch.sin(x), weight, target)
        return loss_sum / num_targets

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss_of(x, weight), (x, weight))
    for a, e in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_bad_arguments() -> None:
    x, weight, target = make_inputs(10, 3, 5)
    with pytest.raises(ValueError, match=r"give \(T, D\), \(V, D\), \(T,\)"):
        linear_cross_entropy(x, weight, target[:3])
    with pytest.raises(ValueError, match="chunk_size=0"):
        linear_cross_entropy(x, weight, target, chunk_size=0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, target.clamp(min=0) + 5)
