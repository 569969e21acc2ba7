"""The SSD kernels, interpreted, against the recurrence: outputs, final state and all gradients."""

import pytest
import torch
from torch import Tensor

from headrace.kernels import ssd_scan, ssd_summary
from headrace.kernels.launch import record_launches
from headrace.kernels.ssd import ssd_reference
from headrace.kernels.ssd.fused import plan as plan_module
from headrace.kernels.ssd.fused import prepare, ssd_fused_backward, ssd_fused_forward
from headrace.kernels.ssd.fused.path import FusedInputs, ssd_fused_reverse_summary
from judge import assert_as_exact, poisoned_memory, results_of

# Weights that are masked away may overflow first.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore:overflow encountered in exp2")]

Inputs = list[Tensor | None]


def make_inputs(
    B: int = 1, L: int = 40, H: int = 2, P: int = 8, G: int = 1, N: int = 8, *, D: int = 1, state: bool = True
) -> Inputs:
    """x, dt, A, B, C, D (of 0, 1 or 2 dims; 0 is none), initial state, in float64."""
    generator = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(B, L, H) - 2)
    skip = [None, normal(H), normal(H, P)][D]
    tensors = [normal(B, L, H, P), dt, -normal(H).exp(), normal(B, L, G, N), normal(B, L, G, N), skip]
    return [*tensors, normal(B, H, P, N) if state else None]


def make_reset(B: int, L: int, at: tuple[int, ...]) -> Tensor:
    reset = torch.zeros(B, L, dtype=torch.bool)
    for row in range(B):
        reset[row, [t + row for t in at if t + row < L]] = True
    return reset


def fused(*tensors: Tensor | None, reset: Tensor | None = None, keep_states: bool = True) -> tuple[Tensor, Tensor]:
    *operands, state = tensors
    return ssd_scan(*operands, initial_state=state, reset=reset, backend="triton", keep_states=keep_states)


def reference(*tensors: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ssd_reference(*tensors, reset)


@pytest.mark.parametrize(
    ("L", "options", "reset_at"),
    [
        (1, {}, None),
        (1, {"D": 0, "state": False}, (0,)),
        (63, {"B": 2}, None),
        (64, {"P": 20, "N": 17}, (0, 15, 16, 17)),  # more than one block of channels, and of columns
        (100, {"H": 4, "G": 2, "D": 2}, (30, 31, 64)),
        (100, {"H": 3, "P": 3, "N": 5, "state": False}, None),
    ],
)
def test_as_exact_as_the_recurrence(L: int, options: dict, reset_at: tuple[int, ...] | None) -> None:
    reset = None if reset_at is None else make_reset(options.get("B", 1), L, reset_at)
    inputs = make_inputs(L=L, **options)
    assert_as_exact(lambda *t: fused(*t, reset=reset), lambda *t: reference(*t, reset=reset), inputs)


def test_fast_decays_cost_no_digits() -> None:
    inputs = make_inputs(L=64)
    inputs[2] = inputs[2] * 20
    assert_as_exact(fused, reference, inputs)


def test_steps_of_zero_and_huge_steps() -> None:
    inputs = make_inputs(L=50)
    inputs[1][:, ::7] = 0.0
    inputs[1][:, 1::9] = 1e4
    assert_as_exact(fused, reference, inputs)


@pytest.mark.parametrize("which", ["y", "state"])
def test_gradients_of_one_result_alone(which: str) -> None:
    index = ["y", "state"].index(which)
    assert_as_exact(lambda *t: fused(*t)[index], lambda *t: reference(*t)[index], make_inputs(L=36))


def test_states_computed_again_give_the_same_bits() -> None:
    inputs = make_inputs(L=70)
    kept, again = (
        results_of(lambda *t, keep=keep: fused(*t, keep_states=keep), inputs, torch.float32) for keep in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, results_of(fused, inputs, torch.float32), strict=True))


def test_segments_within_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "CHUNKS_OF_A_SEGMENT", 1)
    reset = make_reset(1, 150, (40, 130))
    inputs = make_inputs(L=150)
    with record_launches() as launches:
        assert_as_exact(lambda *t: fused(*t, reset=reset), lambda *t: reference(*t, reset=reset), inputs)
    assert [one.name for one in launches].count("_ssd_compose_kernel") == 2
    assert_as_exact(lambda *t: fused(*t, keep_states=False), reference, make_inputs(L=150, state=False))


def test_nothing_crosses_a_reset() -> None:
    start = 50
    reset = make_reset(1, 90, (20, start))
    inputs = [None if t is None else t.float() for t in make_inputs(L=90)]
    changed = [None if t is None else t.clone() for t in inputs]
    for index in (0, 1, 3, 4):
        changed[index][:, :start] = torch.rand_like(changed[index][:, :start]) * 3
    changed[6] = changed[6] * -2
    (y, state), (y_changed, state_changed) = fused(*inputs, reset=reset), fused(*changed, reset=reset)
    assert torch.equal(y[:, start:], y_changed[:, start:])
    assert torch.equal(state, state_changed)
    assert not torch.equal(y[:, :start], y_changed[:, :start])
    leaves = [t.requires_grad_() for t in inputs]
    y, state = fused(*leaves, reset=reset)
    grads = torch.autograd.grad([y[:, start:].sum(), state.sum()], [leaves[i] for i in (0, 1, 3, 4, 6)])
    assert all(grad[:, :start].count_nonzero() == 0 for grad in grads[:4])
    assert grads[4].count_nonzero() == 0


def test_two_halves_joined_by_the_state_equal_the_whole() -> None:
    def halves(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, state = tensors
        ys = []
        for part in (slice(0, 27), slice(27, None)):
            y, state = fused(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_as_exact(halves, reference, make_inputs(L=60))


def test_inputs_cut_out_of_a_wider_tensor() -> None:
    inputs = make_inputs(L=40, P=8, N=8)

    def from_wide(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, state = tensors
        wide = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], 2)
        x, B, C = wide.split([16, 8, 8], 2)
        return fused(x.unflatten(2, (2, 8)), dt, A, B.unflatten(2, (1, 8)), C.unflatten(2, (1, 8)), D, state)

    assert_as_exact(from_wide, reference, inputs)


def test_parameters_need_not_be_packed() -> None:
    x, dt, A, B, C, _, state = make_inputs(L=20)

    def spread(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor
    ) -> tuple[Tensor, Tensor]:
        return fused(x, dt, torch.stack([A, A], 1)[:, 0], B, C, D[:, None].expand(2, 8), state)

    def judge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *operands, state, D = tensors
        return ssd_reference(*operands, D[:, None].expand(2, 8), state)

    assert_as_exact(spread, judge, [x, dt, A, B, C, state, torch.randn(2, dtype=torch.float64)])


def test_no_rows() -> None:
    inputs = [None if t is None or t.dim() < 3 else t[:0].float() for t in make_inputs(L=20)]
    inputs[2] = -torch.ones(2)
    y, state = fused(*inputs)
    assert (y.shape, state.shape) == ((0, 20, 2, 8), (0, 2, 8, 8))


@pytest.mark.parametrize("reset_at", [None, (9,)])
def test_summary(reset_at: tuple[int, ...] | None) -> None:
    reset = None if reset_at is None else make_reset(1, 40, reset_at)
    inputs = make_inputs(L=40)[:4]

    def judge(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        M = torch.exp(dt.sum(1) * A)
        M = M if reset is None else M.masked_fill(reset.any(1)[:, None], 0.0)
        return M, ssd_reference(x, dt, A, B, B, reset=reset)[1]

    assert_as_exact(lambda *t: ssd_summary(*t, reset=reset, backend="triton"), judge, inputs)
    with torch.no_grad(), record_launches() as launches, poisoned_memory():
        M, S = ssd_summary(*(t.float() for t in inputs), reset=reset, backend="triton")
    assert [one.name for one in launches] == ["_ssd_decays_kernel", "_ssd_states_kernel"]
    for actual, expected in zip((M, S), judge(*inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_summary_of_outputs_in_reverse() -> None:
    inputs = make_inputs(L=40, D=0)
    x, dt, A, B, C, *_ = (None if t is None else t.float() for t in inputs)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    dy = torch.randn(x.shape)
    y, _ = ssd_reference(*leaves[:5], None, leaves[5])
    (expected,) = torch.autograd.grad(y, leaves[5], dy.double())
    fused_inputs = FusedInputs(x, dt, A, B, C, None, None)
    actual = ssd_fused_reverse_summary(dy, fused_inputs, prepare(fused_inputs))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_nan() -> None:
    tensors = [None if t is None else t.float() for t in make_inputs(L=40)]
    tensors[0][0, 20, 1, 3] = float("nan")
    y, state = fused(*tensors)
    assert y[0, 20:, 1, 3].isnan().all()
    assert y[0, :16].isfinite().all()
    assert state[0, 1, 3].isnan().all()


def test_few_launches_at_1024_tokens() -> None:
    """Beside those, one sum of PyTorch's in the backward pass."""
    meta = [None if t is None else t.to("meta", torch.bfloat16) for t in make_inputs(1, 1024, 24, 64, 1, 128)]
    inputs = FusedInputs(*meta[:6], None)
    with record_launches("sm_90") as launches:
        shared = prepare(inputs)
        y, _, states = ssd_fused_forward(inputs, None, shared, keep=True)
        forward = len(launches)
        ssd_fused_backward(torch.empty_like(y), None, inputs, None, states, shared)
    assert forward <= 3
    assert len(launches) - forward + 1 <= 5


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    x, dt, A, B, C, D, state = (t.float().requires_grad_() for t in make_inputs(L=20))
    reset = make_reset(1, 20, (5,))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return fused(x.sin(), dt, A, B, C, D, state, reset=reset)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), run(x), strict=True):
        torch.testing.assert_close(actual, expected)
    operator = torch.ops.headrace.ssd_fused.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (x, dt, A, B, C, D, state, reset, True), test_utils=utils)
    torch.library.opcheck(operator, (x, dt, A, B, None, None, None, None, False), test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"x_BLHP": torch.randn(1, 6, 8, 2).transpose(2, 3)}, "x has strides .* must be packed"),
        (
            lambda t: t | {"B_BLGN": torch.randn(1, 6, 1, 300), "C_BLGN": torch.randn(1, 6, 1, 300)},
            "d_state=300 is above",
        ),
        (
            lambda t: t | {"B_BLGN": t["B_BLGN"].bfloat16()},
            "B is torch.bfloat16 and x is torch.float32; give one dtype",
        ),
        (lambda t: t | {"reset": torch.zeros(1, 6, dtype=torch.int64)}, "reset is torch.int64; give torch.bool"),
        (lambda t: {k: v.double() for k, v in t.items()}, "float64 inputs have no Triton path"),
    ],
)
def test_what_kernels_cannot_take_is_named(change: object, message: str) -> None:
    names = ["x_BLHP", "dt_BLH", "A_H", "B_BLGN", "C_BLGN", "D"]
    tensors = dict(zip(names, (t.float() for t in make_inputs(L=6)[:6]), strict=True))
    with pytest.raises(ValueError, match=message):
        ssd_scan(**change(tensors), backend="triton")  # type: ignore[operator]
