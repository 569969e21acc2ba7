"""Norms and gated activations: against their definitions and stock modules, and inside PyTorch."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from headrace.kernels import gated_rms_norm, rms_norm, swiglu
from headrace.kernels.activations import swiglu_reference
from headrace.kernels.norms import gated_rms_norm_reference, rms_norm_reference


def make_inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape, shape, shape[-1:]]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    dy = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)  # exact in any dtype
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def variants(group_size: int | None, norm_before_gate: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def fast(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(x, z, weight, 1e-5, group_size=group_size, norm_before_gate=norm_before_gate)

    def definition(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm_reference(x, z, weight, 1e-5, group_size, norm_before_gate)

    return fast, definition


@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=2), st.integers(1, 4), st.integers(1, 6), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_gated_norm_equals_definition_in_float64(
    leading: list[int], groups: int, group_size: int, grouped: bool, norm_before_gate: bool, seed: int
) -> None:
    inputs = make_inputs(*leading, groups * group_size, seed=seed)
    fast, definition = variants(group_size if grouped else None, norm_before_gate)
    for a, e in zip(results(fast, inputs), results(definition, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_many_blocks_equal_definition(norm_before_gate: bool) -> None:
    inputs = make_inputs(3, 25, 4096)
    fast, definition = variants(512, norm_before_gate)
    for a, e in zip(results(fast, inputs), results(definition, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_rms_norm_equals_definition_and_torch() -> None:
    x, _, weight = make_inputs(2, 7, 12)
    fast = results(lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight])
    definition = results(lambda x, weight: rms_norm_reference(x, weight, 1e-5), [x, weight])
    theirs = results(lambda x, weight: F.rms_norm(x, (12,), weight, 1e-5), [x, weight])
    for a, e, t in zip(fast, definition, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-12)


def test_gated_norm_equals_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, z, weight = (t.detach() for t in make_inputs(2, 7, 12, dtype=torch.float32))
    module = mamba2.MambaRMSNormGated(12, group_size=4, eps=1e-5)
    module.weight.data = weight
    torch.testing.assert_close(gated_rms_norm(x, z, weight, 1e-5, group_size=4), module(x, z))


def test_swiglu_equals_definition_over_many_blocks() -> None:
    inputs = make_inputs(3, 25, 4096)[:2]
    for a, e in zip(results(swiglu, inputs), results(swiglu_reference, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


FUNCTIONS = {
    "gate first": (*variants(8, False), 3),
    "norm first": (*variants(8, True), 3),
    "swiglu": (swiglu, swiglu_reference, 2),
}


@pytest.mark.parametrize(("fast", "definition", "arity"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_float32_error_at_most_twice_the_definitions(fast: Callable, definition: Callable, arity: int) -> None:
    inputs = make_inputs(50, 64, dtype=torch.float32)[:arity]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = results(definition, wide)
    for a, r, e in zip(results(fast, inputs), results(definition, inputs), exact, strict=True):
        assert (a - e).norm() <= 2 * (r - e).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fast", "definition", "arity"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_half_precision_computes_in_float32(
    fast: Callable, definition: Callable, arity: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(5, 64, dtype=dtype)[:arity]
    exact = results(definition, [t.detach().double().requires_grad_() for t in inputs])
    for a, e in zip(results(fast, inputs), exact, strict=True):
        assert a.dtype == dtype
        assert ((a - e).abs() <= torch.finfo(dtype).eps * e.abs() + 1e-5 * e.abs().max()).all()


@pytest.mark.parametrize(("fast", "definition", "arity"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_compiles_as_one_graph(fast: Callable, definition: Callable, arity: int) -> None:
    inputs = make_inputs(5, 64, dtype=torch.float32)[:arity]
    compiled = torch.compile(lambda *values: fast(*(v.sin() for v in values)), fullgraph=True, backend="aot_eager")
    expected = results(lambda *values: fast(*(v.sin() for v in values)), inputs)
    for a, e in zip(results(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_opcheck() -> None:
    x, z, weight = make_inputs(5, 8, dtype=torch.float32)
    for gate, norm_before_gate in ((z, False), (z, True), (None, False)):
        arguments = (x[None], None if gate is None else gate[None], weight, 1e-5, 4, norm_before_gate, False)
        torch.library.opcheck(torch.ops.headrace.gated_rms_norm.default, arguments)
    torch.library.opcheck(torch.ops.headrace.swiglu.default, (x, z, False))


def test_checkpointed_gradients_are_bit_identical() -> None:
    inputs = make_inputs(5, 8)
    fast, _ = variants(4, False)
    again = results(lambda *values: torch.utils.checkpoint.checkpoint(fast, *values, use_reentrant=False), inputs)
    assert all(torch.equal(a, e) for a, e in zip(again, results(fast, inputs), strict=True))


def test_bad_arguments_are_named() -> None:
    x, z, weight = make_inputs(5, 8)
    with pytest.raises(ValueError, match="group_size=3 does not divide D=8"):
        gated_rms_norm(x, z, weight, 1e-5, group_size=3)
    with pytest.raises(ValueError, match="x, z and weight"):
        gated_rms_norm(x, z[:4], weight, 1e-5)
    with pytest.raises(ValueError, match="differ"):
        swiglu(x, z[:4])
