"""The selective scan in PyTorch against its recurrence, against the published implementation, and at its edges."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from headrace.kernels import selective_scan, selective_scan_step, selective_scan_summary
from headrace.kernels.affine import DIAGONAL
from headrace.kernels.selective_scan import chunked
from headrace.kernels.selective_scan.layout import CHUNK
from headrace.kernels.selective_scan.operator import selective_scan_operator

SHAPES = {"L=1": (1, 1), "L=63": (2, 63), "L=64": (1, 64), "L=65": (2, 65), "L=100": (2, 100)}


@dataclasses.dataclass
class Case:
    """Random inputs of the operator; `tensors` are x, dt, A, B, C, D, initial_state."""

    tensors: list[Tensor | None]
    reset: Tensor | None = None

    def run(self, backend: str = "torch") -> tuple[list[Tensor | None], Tensor, Tensor]:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in self.tensors]
        y, state = selective_scan(*leaves[:6], initial_state=leaves[6], reset=self.reset, backend=backend)
        return leaves, y, state

    def results(self, backend: str = "torch", losses: str = "both") -> list[Tensor]:
        """Outputs and all gradients for fixed random output gradients."""
        leaves, y, state = self.run(backend)
        generator = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        dstate = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state.dtype)
        terms = {"both": [(y, dy), (state, dstate)], "y": [(y, dy)], "state": [(state, dstate)]}[losses]
        given_leaves = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(
            [t for t, _ in terms], given_leaves, [g for _, g in terms], allow_unused=True, materialize_grads=True
        )
        return [y.detach(), state.detach(), *grads]

    def to(self, dtype: torch.dtype) -> "Case":
        return Case([None if t is None else t.to(dtype) for t in self.tensors], self.reset)


def make_case(
    B: int = 2,
    L: int = 100,
    width: int = 6,
    N: int = 5,
    *,
    seed: int = 0,
    skip: bool = True,
    initial: bool = True,
    reset_at: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt_BLI = torch.nn.functional.softplus(normal(B, L, width) - 2)
    reset = None
    if reset_at is not None:
        reset = torch.zeros(B, L, dtype=torch.bool)
        for row in range(B):
            reset[row, [t + row for t in reset_at if t + row < L]] = True
    tensors = [normal(B, L, width), dt_BLI, -torch.exp(normal(width, N)), normal(B, L, N), normal(B, L, N)]
    return Case([*tensors, normal(width) if skip else None, normal(B, width, N) if initial else None], reset).to(dtype)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = e.abs().max().clamp(min=1e-30)
        assert (a - e).abs().max() <= tolerance * scale, f"result {index}: {(a - e).abs().max() / scale:.2e}"


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, str]:
    reset_at = draw(st.none() | st.lists(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 99]), max_size=5))
    case = make_case(
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 63, 64, 65, 100])),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 99)),
        skip=draw(st.booleans()),
        initial=draw(st.booleans()),
        reset_at=None if reset_at is None else tuple(reset_at),
    )
    return case, draw(st.sampled_from(["both", "y", "state"]))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_chunked_equals_recurrence_in_float64(drawn: tuple[Case, str]) -> None:
    case, losses = drawn
    assert_close(case.results("torch", losses), case.results("reference", losses), 1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tile_elements", [8, 1 << 5, 1 << 13])
def test_tiles_of_any_size(shape: tuple[int, int], tile_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", tile_elements)
    case = make_case(*shape, reset_at=(0, 31, 32, 64))
    assert_close(case.results(), case.results("reference"), 1e-10)


def test_gradcheck() -> None:
    case = make_case(1, 5, 3, 2, reset_at=(3,))
    leaves = [t.requires_grad_() for t in case.tensors if t is not None]

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(x, dt, A, B, C, D, initial_state=S, reset=case.reset)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("decay", [0.01, 1.0, 8.0], ids=["slow", "usual", "fast"])
def test_float32_error_at_most_twice_the_recurrences(decay: float) -> None:
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial"]
    squares = {name: torch.zeros(2) for name in names}
    for seed in range(6):
        case = make_case(2, 200, 24, 16, seed=seed, reset_at=(10, 70) if seed % 2 else None)
        case.tensors[2] = case.tensors[2] * decay
        single = case.to(torch.float32)
        results = (single.to(torch.float64).results("reference"), single.results("reference"), single.results())
        for name, exact, reference, fast in zip(names, *results, strict=True):
            errors = [(value - exact).norm() / exact.norm() for value in (reference, fast)]
            squares[name] += torch.tensor(errors).square()
    for name, (reference, fast) in squares.items():
        ratio = (fast / reference).sqrt()
        assert ratio <= 2, f"{name}: {ratio:.2f} times the error of the recurrence"


@pytest.mark.parametrize("cut", [1, 64, 77])
def test_two_halves_joined_by_the_state_equal_the_whole(cut: int) -> None:
    case = make_case(2, 130, reset_at=(20, 90))
    whole = case.results()
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    x, dt, A, B, C, D, S = leaves
    ys, state = [], S
    for part in (slice(0, cut), slice(cut, None)):
        operands = (x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        y, state = selective_scan(*operands, initial_state=state, reset=case.reset[:, part])
        ys.append(y)
    y = torch.cat(ys, 1)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    dstate = torch.randn(state.shape, generator=generator, dtype=y.dtype)
    assert_close([y, state, *torch.autograd.grad([y, state], leaves, [dy, dstate])], whole, 1e-12)


@pytest.mark.parametrize("before", [3.0, float("nan"), float("inf")])
def test_nothing_crosses_a_reset(before: float) -> None:
    start = 70
    case = make_case(1, 150, reset_at=(20, start), dtype=torch.float32)
    _, y, state = case.run()
    changed = Case([t.clone() for t in case.tensors], case.reset)
    for index in (0, 1, 3, 4):
        changed.tensors[index][:, :start] *= before
    leaves, y_changed, state_changed = changed.run()
    assert torch.equal(y[:, start:], y_changed[:, start:])
    assert torch.equal(state, state_changed)
    assert not torch.equal(y[:, :start], y_changed[:, :start])
    grads = torch.autograd.grad([y_changed[:, start:].sum(), state_changed.sum()], [leaves[i] for i in (0, 1, 3, 4, 6)])
    if before == 3.0:
        for grad in grads[:4]:
            assert grad[:, :start].count_nonzero() == 0
        assert grads[4].count_nonzero() == 0
    for grad in grads[:4]:
        assert grad[:, start:].isfinite().all()


def test_nan_gradients_do_not_cross_a_reset() -> None:
    case = make_case(1, 100, reset_at=(40,), dtype=torch.float32)
    leaves, y, _ = case.run()
    dy = torch.ones_like(y)
    dy[:, 50] = float("nan")
    dx, dt, *_, dinitial = torch.autograd.grad(y, [leaves[0], leaves[1], leaves[6]], dy)
    assert dx[:, :40].isfinite().all()
    assert dt[:, :40].isfinite().all()
    assert dinitial.isfinite().all()
    assert dx[:, 40:51].isnan().all()


def test_extreme_steps_stay_finite_and_exact() -> None:
    case = make_case(1, 130, reset_at=(50,))
    case.tensors[1][:, ::7] = 0.0
    case.tensors[1][:, 1::9] = 1e4
    assert_close(case.results(), case.results("reference"), 1e-10)
    for value in case.to(torch.float32).results():
        assert value.isfinite().all()


def test_steps_equal_the_scan() -> None:
    case = make_case(2, 9)
    x, dt, A, B, C, D, state = case.tensors
    y_BLI, final_state = selective_scan(x, dt, A, B, C, D, initial_state=state)
    for t in range(9):
        y_BI, state = selective_scan_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        torch.testing.assert_close(y_BI, y_BLI[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reset_at", [None, (0,), (40,)], ids=str)
def test_summaries_predict_the_final_state_with_its_gradients(reset_at: tuple[int, ...] | None) -> None:
    case = make_case(2, 100, reset_at=reset_at)
    results = []
    for joined in (False, True):
        leaves = [t.clone().requires_grad_() for t in case.tensors]
        x, dt, A, B, C, D, S = leaves
        if joined:
            parts = []
            for part in (slice(30), slice(30, None)):
                reset = None if case.reset is None else case.reset[:, part]
                parts.append(selective_scan_summary(x[:, part], dt[:, part], A, B[:, part], reset=reset))
            M, S_local = DIAGONAL.compose(parts[1], parts[0])
            state = DIAGONAL.apply(M, S) + S_local
        else:
            _, state = selective_scan(x, dt, A, B, C, D, initial_state=S, reset=case.reset)
        weights = torch.linspace(-1, 1, state.numel(), dtype=state.dtype).view(state.shape)
        results.append([state.detach(), *torch.autograd.grad((state * weights).sum(), [x, dt, A, B, S])])
    assert_close(results[1], results[0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    case = make_case(2, 100).to(dtype)
    leaves, y, state = case.run()
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    _, exact_y, exact_state = case.to(torch.float64).run("reference")
    resolution = torch.finfo(dtype).eps
    assert ((y - exact_y).abs() <= resolution * exact_y.abs() + 1e-5 * exact_y.abs().max()).all()
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


def test_equals_the_recurrence_written_out() -> None:
    """`y_t = sum_j C_t exp(A sum_(j < k <= t) dt_k) dt_j B_j x_j`: every pair of tokens, no state."""
    x, dt, A, B, C, D, _ = make_case(2, 100).tensors
    passed = dt.cumsum(1)
    pairs = passed[:, :, None] - passed[:, None]
    visible = torch.ones(100, 100, dtype=torch.bool).tril()[..., None]
    decay_BQjIN = torch.where(visible, pairs, torch.inf)[..., None].mul(A).exp()
    expected = torch.einsum("bqjin,bqn,bjn,bji->bqi", decay_BQjIN, C, B, dt * x) + D * x
    torch.testing.assert_close(selective_scan(x, dt, A, B, C, D)[0], expected, rtol=1e-10, atol=1e-10)


def test_equals_transformers_mamba() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(mamba, "mamba_selective_scan"):
        pytest.skip("this release of transformers has no selective scan of its own")
    x, dt, A, B, C, D, _ = make_case(2, 100, dtype=torch.float32).tensors
    y, state = selective_scan(x, dt, A, B, C, D)
    their_y, their_state = mamba.mamba_selective_scan(
        *(t.transpose(1, 2) for t in (x, dt)), A, *(t.transpose(1, 2) for t in (B, C)), D, return_last_state=True
    )
    torch.testing.assert_close(y, their_y.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, their_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optional", ["all", "none", "no output"])
def test_opcheck(optional: str) -> None:
    case = make_case(2, 70, reset_at=(5, 40), dtype=torch.float32)
    x, dt, A, B, C, D, state = (t.requires_grad_() for t in case.tensors)
    arguments = {
        "all": (x, dt, A, B, C, D, state, case.reset, True, False),
        "none": (x, dt, A, B, C, None, None, None, True, False),
        "no output": (x, dt, A, B, None, None, None, case.reset, True, False),
    }[optional]
    torch.library.opcheck(selective_scan_operator, arguments)


def loss_of(*tensors: Tensor) -> Tensor:
    x, dt, A, B, C, D, S = tensors
    y, state = selective_scan(torch.sin(x), dt, A, B, C, D, initial_state=S)
    return y.square().sum() + state.square().sum()


def test_compiles_as_one_graph_and_recomputes_bit_for_bit() -> None:
    inputs = [t.requires_grad_() for t in make_case(dtype=torch.float32).tensors]
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for loss in (compiled(*inputs), checkpoint(loss_of, *inputs, use_reentrant=False)):
        for actual, grad in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            assert torch.equal(actual, grad)


def test_fake_tensors_flow_through() -> None:
    with FakeTensorMode():
        inputs = [torch.empty(2, 300, 6), torch.empty(2, 300, 6), torch.empty(6, 4), torch.empty(2, 300, 4)]
        inputs = [t.requires_grad_() for t in (*inputs, torch.empty(2, 300, 4), torch.empty(6), torch.empty(2, 6, 4))]
        loss_of(*inputs).backward()
        assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


def test_kept_memory_is_inputs_and_chunk_states() -> None:
    x, dt, A, B, C, D, _ = (t.requires_grad_() for t in make_case(1, 256, 64, 16, dtype=torch.float32).tensors)
    storages: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        kept = selective_scan(x, dt, A, B, C, D)
    assert kept is not None
    given_bytes = sum(t.numel() * 4 for t in (x, dt, A, B, C, D))
    assert sum(storages.values()) == given_bytes + 256 // CHUNK * 64 * 16 * 4


def test_strided_inputs_equal_contiguous_ones() -> None:
    x, dt, A, B, C, D, _ = (t.detach() for t in make_case(dtype=torch.float32).tensors)
    joined = torch.cat([x, B, C, dt], dim=2).requires_grad_()
    x_part, B_part, C_part, dt_part = joined.split([6, 5, 5, 6], dim=2)
    y, _ = selective_scan(x_part, dt_part, A, B_part, C_part, D)
    assert torch.equal(y, selective_scan(x, dt, A, B, C, D)[0])
    y.transpose(1, 2).contiguous().sum().backward()
    assert joined.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "other"}, "backend='other'"),
        ({"dt_BLI": torch.zeros(2, 6, 5)}, "dt has shape"),
        ({"A_IN": torch.zeros(6, 4)}, "B has shape"),
        ({"C_BLN": torch.zeros(2, 5, 5)}, "C has shape"),
        ({"D_I": torch.zeros(3)}, "D has shape"),
        ({"B_BLN": torch.zeros(2, 6, 5, dtype=torch.long)}, "B is torch.int64"),
        ({"initial_state": torch.zeros(2, 5, 6)}, "initial_state has shape"),
        ({"reset": torch.zeros(2, 3, dtype=torch.bool)}, "reset is torch.bool of shape"),
        ({"reset": torch.zeros(2, 6)}, "give a bool mask"),
        ({"x_BLI": torch.zeros(2, 6)}, "x has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    names = ["x_BLI", "dt_BLI", "A_IN", "B_BLN", "C_BLN", "D_I", "initial_state"]
    arguments = dict(zip(names, make_case(2, 6).tensors, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)
    with pytest.raises(ValueError, match="dt has shape"):
        selective_scan_summary(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), torch.zeros(3, 4), torch.zeros(1, 2, 4))
