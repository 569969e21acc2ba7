"""The kernels of the norms, interpreted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels import add_rms_norm, gated_rms_norm, rms_norm
from headrace.kernels.launch import record_launches
from headrace.kernels.norms import add_rms_norm_reference, gated_rms_norm_reference, rms_norm_reference
from judge import assert_as_exact, poisoned_memory

pytestmark = pytest.mark.interpreted

EPS = 1e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators(gate: str, group_size: int | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernel and its definition, of a norm with its gate `first`, `last` or `none`."""
    if gate == "none":
        return (
            lambda x, weight: rms_norm(x, weight, EPS, backend="triton"),
            lambda x, weight: rms_norm_reference(x, weight, EPS),
        )
    options = {"group_size": group_size, "norm_before_gate": gate == "last"}
    return (
        lambda x, z, weight: gated_rms_norm(x, z, weight, EPS, **options, backend="triton"),
        lambda x, z, weight: gated_rms_norm_reference(x, z, weight, EPS, **options),
    )


def inputs(gate: str, *shape: int) -> list[Tensor]:
    x, z, weight = normal(*shape), normal(*shape, seed=1) * 2, normal(shape[-1], seed=2)
    return [x, weight] if gate == "none" else [x, z, weight]


GATES = ["none", "first", "last"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 63, 64, 100])
def test_as_exact_as_the_definition(gate: str, length: int) -> None:
    assert_as_exact(*operators(gate, None), inputs(gate, 2, length, 24))


@pytest.mark.parametrize("gate", ["first", "last"])
@pytest.mark.parametrize(("groups", "group_size"), [(1, 1), (3, 1), (2, 8), (5, 12), (2, 70)])
def test_groups_of_any_size(gate: str, groups: int, group_size: int) -> None:
    assert_as_exact(*operators(gate, group_size), inputs(gate, 3, 7, groups * group_size))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("tokens", "width"), [(3, 1500), (2, 4096), (11, 4100)])
def test_wide_groups(gate: str, tokens: int, width: int) -> None:
    assert_as_exact(*operators(gate, None), inputs(gate, tokens, width))


def test_several_wide_groups() -> None:
    assert_as_exact(*operators("first", 5000), inputs("first", 9, 10000))


@pytest.mark.parametrize("shape", [(37,), (4, 37), (2, 3, 2, 37), (0, 37), (2, 0, 37)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    assert_as_exact(*operators("first", None), inputs("first", *shape))


@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 20), (63, 20), (64, 20), (100, 20), (3, 4100), (4, 1)])
def test_sum_and_norm_as_exact_as_the_definition(length: int, width: int) -> None:
    tensors = [normal(2, length, width), normal(2, length, width, seed=1), normal(width, seed=2)]
    assert_as_exact(
        lambda *t: add_rms_norm(*t, EPS, backend="triton"), lambda *t: add_rms_norm_reference(*t, EPS), tensors
    )


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sum_or_norm_alone_has_gradients(used: int, backend: str) -> None:
    tensors = [normal(4, 6), normal(4, 6, seed=1), normal(6, seed=2)]
    assert_as_exact(
        lambda *t: add_rms_norm(*t, EPS, backend=backend)[used],
        lambda *t: add_rms_norm_reference(*t, EPS)[used],
        tensors,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_update_of_a_float32_stream(backend: str) -> None:
    x, update, weight = normal(4, 16).float(), normal(4, 16, seed=1).bfloat16(), normal(16, seed=2).bfloat16()
    leaves = [t.requires_grad_() for t in (x, update, weight)]
    dnormed, dsum = normal(4, 16, seed=3).bfloat16(), normal(4, 16, seed=4).float()
    with poisoned_memory():
        normed, total = add_rms_norm(*leaves, EPS, backend=backend)
        grads = torch.autograd.grad([normed, total], leaves, [dnormed, dsum])
    exact, exact_total = add_rms_norm_reference(x.double(), update.double(), weight.double(), EPS)
    exact_grads = torch.autograd.grad([exact, exact_total], leaves, [dnormed.double(), dsum.double()])
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    for actual, expected in zip([normed, total, *grads], [exact, exact_total, *exact_grads], strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2**-7, atol=2**-8)


def test_rounded_sum_is_what_is_normalised() -> None:
    x, update, weight = normal(4, 16).bfloat16(), normal(4, 16, seed=1).bfloat16() / 64, torch.ones(16)
    normed, total = add_rms_norm(x, update, weight, EPS, backend="torch")
    torch.testing.assert_close(normed, rms_norm_reference(total.float(), weight, EPS))


def test_views_of_a_wider_tensor_are_read_as_they_lie() -> None:
    wide = normal(3, 5, 64).float()
    x, z = wide[:, 1:4, 8:24], wide[:, 1:4, 24:40]
    weight = normal(16, seed=2).float()
    with record_launches() as launches:
        actual = gated_rms_norm(x, z, weight, EPS, group_size=8, backend="triton")
    assert launches[0].arguments["x_ptr"].data_ptr() == x.data_ptr()
    assert launches[0].arguments["z_ptr"].data_ptr() == z.data_ptr()
    expected = gated_rms_norm(x.contiguous(), z.contiguous(), weight, EPS, group_size=8, backend="triton")
    assert torch.equal(actual, expected)

    grads = []
    for one, two in ((x, z), (x.contiguous(), z.contiguous())):
        one, two = one.detach().requires_grad_(), two.detach().requires_grad_()
        y = gated_rms_norm(one, two, weight, EPS, group_size=8, backend="triton")
        grads.append(torch.autograd.grad(y, [one, two], torch.ones(()).expand(y.shape)))
    assert all(torch.equal(a, e) for a, e in zip(*grads, strict=True))


def test_sum_reads_views_as_they_lie() -> None:
    wide, weight = normal(3, 5, 64).float(), normal(16, seed=2).float()
    x, update = wide[:, 1:4, 8:24], wide[:, 1:4, 24:40]
    actual = add_rms_norm(x, update, weight, EPS, backend="triton")
    expected = add_rms_norm(x.contiguous(), update.contiguous(), weight, EPS, backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_one_launch_each_way() -> None:
    x, weight = normal(2, 9, 16).float().requires_grad_(), normal(16, seed=2).float().requires_grad_()
    with record_launches() as launches:
        normed, total = add_rms_norm(x, x.detach(), weight, EPS, backend="triton")
        (normed.sum() + total.sum()).backward()
    assert [launch.name for launch in launches] == ["_norm_forward_kernel", "_norm_backward_kernel"]


@pytest.mark.parametrize("width", [12, 4100])
@pytest.mark.parametrize("gate", GATES)
def test_nan_stays_with_its_token(gate: str, width: int) -> None:
    kernel, _ = operators(gate, None)
    tensors = [t.float().requires_grad_() for t in inputs(gate, 5, width)]
    with torch.no_grad():
        tensors[0][2, 7] = float("nan")
    y = kernel(*tensors)
    dx, *_, dweight = torch.autograd.grad(y, tensors, torch.ones_like(y))
    for value in (y, dx):
        assert value.isnan().any(1).tolist() == [False, False, True, False, False]
    assert dweight.isnan().all()


def test_repeats_bit_for_bit() -> None:
    tensors = [t.float().requires_grad_() for t in inputs("first", 100, 24)]
    kernel, _ = operators("first", 8)
    runs = []
    for _ in range(2):
        y = kernel(*tensors)
        runs.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    x, z, weight = (t.float() for t in inputs("first", 2, 5, 8))
    leaves = [t.requires_grad_() for t in (x, z, weight)]

    def both(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = gated_rms_norm(x.sin(), z, weight, EPS, group_size=4, backend="triton")
        normed, total = add_rms_norm(x, y, weight, EPS, backend="triton")
        return normed + total.cos()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*leaves), both(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)
    for gate, last in ((z, False), (z, True), (None, False)):
        torch.library.opcheck(torch.ops.headrace.gated_rms_norm.default, (x, gate, weight, EPS, 4, last, True))
    for fused in (False, True):
        torch.library.opcheck(torch.ops.headrace.add_rms_norm.default, (x, z, weight, EPS, fused))


def test_mixed_dtypes_pass_opcheck() -> None:
    x, update, weight = normal(2, 3, 8).float(), normal(2, 3, 8).bfloat16(), normal(8).bfloat16()
    leaves = [t.requires_grad_() for t in (x, update, weight)]
    torch.library.opcheck(torch.ops.headrace.add_rms_norm.default, (*leaves, EPS, False))


def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(4, 6, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"pass z\.contiguous\(\)"):
        gated_rms_norm(x, x.transpose(0, 2).contiguous().transpose(0, 2), weight, EPS, backend="triton")
    four = torch.randn(4, 3, 6, 8)
    with pytest.raises(ValueError, match=r"pass x\.contiguous\(\)"):
        rms_norm(four.transpose(0, 1), weight, EPS, backend="triton")
    torch.testing.assert_close(rms_norm(four.transpose(0, 1), weight, EPS), rms_norm(four, weight, EPS).transpose(0, 1))
    with pytest.raises(ValueError, match="16385 channels are wider than 16384"):
        rms_norm(torch.randn(1, 16385), torch.randn(16385), EPS, backend="triton")
    with pytest.raises(ValueError, match="give one dtype"):
        gated_rms_norm(x, x.double(), weight, EPS)
    with pytest.raises(ValueError, match="x, update and weight"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="float64"):
        add_rms_norm(x, x.double(), weight, EPS, backend="triton")
