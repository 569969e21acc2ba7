"""The chunked SSD path against the recurrence, against the published formulation, and at its edges."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import ssd_scan, ssd_step
from headrace.kernels.ssd import ssd_reference
from headrace.kernels.ssd.layout import compute_decays, decay_matrix

SHAPES = {"L=1": (1, 1), "L=63": (2, 63), "L=64": (1, 64), "L=65": (2, 65), "L=100": (2, 100)}


@dataclasses.dataclass
class Case:
    """Random inputs of the operator; `tensors` are x, dt, A, B, C, D, initial_state."""

    tensors: list[Tensor | None]
    reset: Tensor | None = None

    def run(self, backend: str = "auto", **options: object) -> tuple[list[Tensor | None], Tensor, Tensor]:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in self.tensors]
        y, state = ssd_scan(*leaves[:6], initial_state=leaves[6], reset=self.reset, backend=backend, **options)
        return leaves, y, state

    def results(self, backend: str = "auto", losses: str = "both", **options: object) -> list[Tensor]:
        """Outputs and all gradients for fixed random output gradients."""
        leaves, y, state = self.run(backend, **options)
        generator = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        dstate = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state.dtype)
        terms = {"both": [(y, dy), (state, dstate)], "y": [(y, dy)], "state": [(state, dstate)]}[losses]
        given_leaves = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(
            [t for t, _ in terms], given_leaves, [g for _, g in terms], allow_unused=True, materialize_grads=True
        )
        return [y.detach(), state, *grads]

    def to(self, dtype: torch.dtype) -> "Case":
        return Case([None if t is None else t.to(dtype) for t in self.tensors], self.reset)


def make_case(
    B: int = 2,
    L: int = 100,
    H: int = 4,
    P: int = 3,
    G: int = 2,
    N: int = 5,
    *,
    seed: int = 0,
    d_dims: int = 1,
    initial: bool = True,
    reset_at: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt_BLH = torch.nn.functional.softplus(normal(B, L, H) - 2)
    A_H = -torch.exp(normal(H))
    D = [None, normal(H), normal(H, P)][d_dims]
    reset = None
    if reset_at is not None:
        reset = torch.zeros(B, L, dtype=torch.bool)
        for row in range(B):
            reset[row, [t + row for t in reset_at if t + row < L]] = True
    tensors = [normal(B, L, H, P), dt_BLH, A_H, normal(B, L, G, N), normal(B, L, G, N), D]
    return Case([*tensors, normal(B, H, P, N) if initial else None], reset).to(dtype)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = e.abs().max().clamp(min=1e-30)
        assert (a - e).abs().max() <= tolerance * scale, f"result {index}: {(a - e).abs().max() / scale:.2e}"


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, dict[str, object], str]:
    G = draw(st.integers(1, 3))
    L = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 130]))
    reset_at = draw(st.none() | st.lists(st.sampled_from([0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 66, 99]), max_size=5))
    case = make_case(
        draw(st.integers(1, 3)),
        L,
        G * draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        G,
        draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 99)),
        d_dims=draw(st.integers(0, 2)),
        initial=draw(st.booleans()),
        reset_at=None if reset_at is None else tuple(reset_at),
    )
    options = {"keep_states": draw(st.booleans()), "chunk_size": draw(st.sampled_from([1, 8, 13, 64, 256]))}
    return case, options, draw(st.sampled_from(["both", "y", "state"]))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_chunked_equals_recurrence_in_float64(drawn: tuple[Case, dict[str, object], str]) -> None:
    case, options, losses = drawn
    assert_close(case.results("torch", losses, **options), case.results("reference", losses), 1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("reset_at", [None, (0,), (30, 31, 32), (0, 63, 64, 98)], ids=str)
def test_lengths_and_resets_at_full_chunk_length(shape: tuple[int, int], reset_at: tuple[int, ...] | None) -> None:
    B, L = shape
    case = make_case(B, L, H=2, P=48, G=1, N=48, reset_at=reset_at)  # wide enough for chunks of 64
    assert_close(case.results(), case.results("reference"), 1e-10)


def test_gradcheck() -> None:
    case = make_case(1, 5, H=2, P=2, G=1, N=2, d_dims=2, reset_at=(3,))
    leaves = [t.requires_grad_() for t in case.tensors if t is not None]

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan(x, dt, A, B, C, D, initial_state=S, reset=case.reset, chunk_size=2)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("decay", [0.01, 1.0, 8.0], ids=["slow", "usual", "fast"])
def test_float32_error_at_most_twice_the_recurrences(decay: float) -> None:
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial"]
    squares = {name: torch.zeros(2) for name in names}
    for seed in range(6):
        case = make_case(2, 200, H=4, P=16, G=2, N=16, seed=seed, reset_at=(10, 70) if seed % 2 else None)
        case.tensors[2] = case.tensors[2] * decay
        single = case.to(torch.float32)
        results = (single.to(torch.float64).results("reference"), single.results("reference"), single.results())
        for name, exact, reference, chunked in zip(names, *results, strict=True):
            errors = [(value - exact).detach().norm() / exact.detach().norm() for value in (reference, chunked)]
            squares[name] += torch.tensor(errors).square()
    for name, (reference, chunked) in squares.items():
        ratio = (chunked / reference).sqrt()
        assert ratio <= 2, f"{name}: {ratio:.2f} times the error of the recurrence"


def test_extreme_steps_stay_finite_and_exact() -> None:
    case = make_case(1, 130, H=2, P=3, G=1, N=4, reset_at=(50,))
    case.tensors[1][:, ::7] = 0.0
    case.tensors[1][:, 1::9] = 1e4
    assert_close(case.results(), case.results("reference"), 1e-10)
    for value in case.to(torch.float32).results():
        assert value.isfinite().all()


@pytest.mark.parametrize("size", [10.0, 1e3, 1e6, 1e12])
def test_large_steps_cost_later_tokens_no_digits(size: float) -> None:
    case = make_case(2, 128, H=4, P=48, G=1, N=48)  # one group, wide enough for chunks of 64
    case.tensors[1][:, 64:80] *= size
    single = case.to(torch.float32)
    exact, reference, chunked = (
        run.run(backend)[1][:, 80:].double().detach()
        for run, backend in ((single.to(torch.float64), "reference"), (single, "reference"), (single, "torch"))
    )
    assert (chunked - exact).norm() <= 2 * (reference - exact).norm()


def test_no_decay_is_a_denormal_number() -> None:
    dt_nQH = torch.rand(3, 64, 8) * 3
    reset_nQ = torch.rand(3, 64) < 0.05
    decays = compute_decays(dt_nQH, -torch.arange(1.0, 9.0), reset_nQ)
    matrix = decay_matrix(decays, slice(0, 3))
    for values in (decays.into_nQH, decays.out_nQH, decays.through_nH, matrix):
        assert ((values == 0) | (values >= 2.0**-64)).all()
    assert (matrix <= 1).all()


@pytest.mark.parametrize("cut", [1, 64, 77])
def test_two_halves_joined_by_the_state_equal_the_whole(cut: int) -> None:
    case = make_case(2, 130, reset_at=(20, 90))
    whole = case.results()
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    x, dt, A, B, C, D, S = leaves
    ys, state = [], S
    for part in (slice(0, cut), slice(cut, None)):
        operands = (x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        y, state = ssd_scan(*operands, initial_state=state, reset=case.reset[:, part])
        ys.append(y)
    y = torch.cat(ys, 1)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    dstate = torch.randn(state.shape, generator=generator, dtype=y.dtype)
    assert_close([y, state, *torch.autograd.grad([y, state], leaves, [dy, dstate])], whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_crosses_a_reset(dtype: torch.dtype) -> None:
    start = 70
    case = make_case(1, 150, H=2, P=48, G=1, N=48, reset_at=(20, start), dtype=dtype)
    _, y, state = case.run()
    changed = Case([t.clone() for t in case.tensors], case.reset)
    for index in (0, 1, 3, 4):
        changed.tensors[index][:, :start] = torch.rand_like(changed.tensors[index][:, :start]) * 3
    changed.tensors[6] = changed.tensors[6] * -2
    _, y_changed, state_changed = changed.run()
    assert torch.equal(y[:, start:], y_changed[:, start:])
    assert torch.equal(state, state_changed)
    assert not torch.equal(y[:, :start], y_changed[:, :start])

    leaves, y, state = case.run()
    grads = torch.autograd.grad([y[:, start:].sum(), state.sum()], [leaves[i] for i in (0, 1, 3, 4, 6)])
    for grad in grads[:4]:
        assert grad[:, :start].count_nonzero() == 0
    assert grads[4].count_nonzero() == 0


def test_steps_equal_the_scan() -> None:
    case = make_case(2, 9, d_dims=2)
    x, dt, A, B, C, D, state = case.tensors
    y_BLHP, final_state = ssd_scan(x, dt, A, B, C, D, initial_state=state)
    for t in range(9):
        y_BHP, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        torch.testing.assert_close(y_BHP, y_BLHP[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    case = make_case(2, 100, P=8, N=8).to(dtype)
    leaves, y, state = case.run()
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    _, exact_y, exact_state = case.to(torch.float64).run("reference")
    resolution = torch.finfo(dtype).eps
    assert ((y - exact_y).abs() <= resolution * exact_y.abs() + 1e-5 * exact_y.abs().max()).all()
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


def minimal_ssd(X: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The quadratic form of the paper (arXiv 2405.21060, equation 16): `Y = (L * C B^T) X` over the whole length."""
    cumulative = log_decay.cumsum(1)
    difference = cumulative[:, :, None] - cumulative[:, None, :]
    visible = torch.ones(X.shape[1], X.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    decay_BQJH = torch.where(visible, difference.exp(), 0.0)
    return torch.einsum("bqjh,bqhn,bjhn,bjhp->bqhp", decay_BQJH, C, B, X)


def test_equals_the_papers_quadratic_form() -> None:
    x, dt, A, B, C, D, _ = make_case(2, 100, G=2).tensors
    y, _ = ssd_scan(x, dt, A, B, C, D)
    B_BLHN, C_BLHN = B.repeat_interleave(2, 2), C.repeat_interleave(2, 2)
    expected = minimal_ssd(x * dt[..., None], dt * A, B_BLHN, C_BLHN) + x * D[:, None]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_equals_transformers_mamba2() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    case = make_case(2, 100, dtype=torch.float32)
    *operands, D, initial_state = case.tensors
    y, final_state = ssd_scan(*operands, D, initial_state=initial_state)
    their_y, their_state = mamba2.mamba2_chunk_scan(
        *operands, chunk_size=32, D=D, initial_states=initial_state, return_final_states=True
    )
    torch.testing.assert_close(y, their_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final_state, their_state, rtol=1e-4, atol=1e-4)


def test_reference_works_in_place_of_the_scan() -> None:
    case = make_case(1, 4)
    *operands, initial_state = case.tensors
    y, _ = ssd_reference(*operands, initial_state=initial_state)
    torch.testing.assert_close(y, case.run("reference")[1].detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "float64 inputs have no Triton path"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"reset": torch.zeros(2, 3, dtype=torch.bool)}, "reset has shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state has shape"),
        ({"D": torch.zeros(3)}, "D has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    case = make_case(2, 6)
    names = ["x_BLHP", "dt_BLH", "A_H", "B_BLGN", "C_BLGN", "D", "initial_state"]
    arguments = dict(zip(names, case.tensors, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ssd_scan(**arguments)


def test_groups_that_do_not_divide_heads() -> None:
    x, dt, A, _, _, _, _ = make_case(1, 4, H=4).tensors
    B_BLGN = torch.zeros(1, 4, 3, 5, dtype=x.dtype)
    with pytest.raises(ValueError, match="G must divide H"):
        ssd_scan(x, dt, A, B_BLGN, B_BLGN)
