"""The selective scan's kernels, interpreted, against the recurrence: outputs, final state and all gradients."""

import pytest
import torch
from torch import Tensor

from headrace.kernels import selective_scan, selective_scan_summary
from headrace.kernels.selective_scan import selective_scan_reference
from judge import assert_as_exact, results_of

pytestmark = pytest.mark.interpreted


def make_inputs(B: int = 1, L: int = 40, I: int = 6, N: int = 4, *, D: bool = True, state: bool = True) -> list:  # noqa: E741
    """x, dt, A, B, C, D, initial state, in float64."""
    generator = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(B, L, I) - 2)
    tensors = [normal(B, L, I), dt, -normal(I, N).exp(), normal(B, L, N), normal(B, L, N)]
    return [*tensors, normal(I) if D else None, normal(B, I, N) if state else None]


def make_reset(B: int, L: int, at: tuple[int, ...]) -> Tensor:
    reset = torch.zeros(B, L, dtype=torch.bool)
    for row in range(B):
        reset[row, [t + row for t in at if t + row < L]] = True
    return reset


def fused(*tensors: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *operands, state = tensors
    return selective_scan(*operands, initial_state=state, reset=reset, backend="triton")


@pytest.mark.parametrize(
    ("L", "options", "reset_at"),
    [
        (1, {}, None),
        (1, {"D": False, "state": False}, (0,)),
        (63, {"B": 2}, None),
        (64, {"I": 20, "N": 5}, (0, 15, 16, 17)),
        (100, {"N": 17}, (30, 31, 64)),
        (100, {"I": 3, "state": False}, None),
    ],
)
def test_as_exact_as_the_recurrence(L: int, options: dict, reset_at: tuple[int, ...] | None) -> None:
    reset = None if reset_at is None else make_reset(options.get("B", 1), L, reset_at)
    inputs = make_inputs(L=L, **options)
    assert_as_exact(lambda *t: fused(*t, reset=reset), lambda *t: selective_scan_reference(*t, reset), inputs)


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_of_one_result_alone(index: int) -> None:
    assert_as_exact(lambda *t: fused(*t)[index], lambda *t: selective_scan_reference(*t)[index], make_inputs(L=20))


def test_the_same_bits_again() -> None:
    inputs = make_inputs(L=50)
    first, second = (results_of(fused, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_crosses_a_reset() -> None:
    start = 30
    reset = make_reset(1, 50, (start,))
    inputs = [t.float() for t in make_inputs(L=50)]
    changed = [t.clone() for t in inputs]
    for index in (0, 1, 3, 4):
        changed[index][:, :start] = torch.rand_like(changed[index][:, :start]) * 3
    (y, state), (y_changed, state_changed) = fused(*inputs, reset=reset), fused(*changed, reset=reset)
    assert torch.equal(y[:, start:], y_changed[:, start:])
    assert torch.equal(state, state_changed)


def test_nan_stays_nan() -> None:
    tensors = [t.float() for t in make_inputs(L=20)]
    tensors[0][0, 10, 2] = float("nan")
    y, state = fused(*tensors)
    assert y[0, 10:, 2].isnan().all()
    assert y[0, :10].isfinite().all()
    assert state[0, 2].isnan().all()


def test_inputs_cut_out_of_a_wider_tensor() -> None:
    def from_wide(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, state = tensors
        x, B, C = torch.cat([x, B, C], 2).split([6, 4, 4], 2)
        return fused(x, dt, A, B, C, D, state)

    assert_as_exact(from_wide, selective_scan_reference, make_inputs(L=20))


def test_summary() -> None:
    inputs = make_inputs(L=40)[:4]

    def judge(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(dt.sum(1)[..., None] * A), selective_scan_reference(x, dt, A, B, B)[1]

    assert_as_exact(lambda *t: selective_scan_summary(*t, backend="triton"), judge, inputs)


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    x, *rest, state = (t.float().requires_grad_() for t in make_inputs(L=12))
    compiled = torch.compile(lambda x: fused(x.sin(), *rest, state), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), fused(x.sin(), *rest, state), strict=True):
        torch.testing.assert_close(actual, expected)
    operator = torch.ops.headrace.selective_scan.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (x, *rest, state, None, True, True), test_utils=utils)


def test_what_kernels_cannot_take_is_named() -> None:
    x, dt, A, B, C, *_ = (t.float() for t in make_inputs(L=6))
    with pytest.raises(ValueError, match=r"x has strides .* give x\.contiguous\(\)"):
        selective_scan(x.mT.contiguous().mT, dt, A, B, C, backend="triton")
    wide = torch.zeros(1, 6, 300)
    with pytest.raises(ValueError, match="state size N=300 is above 256"):
        selective_scan(x, dt, -torch.ones(6, 300), wide, wide, backend="triton")
