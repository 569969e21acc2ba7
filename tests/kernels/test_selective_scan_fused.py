"""The selective scan's kernels, interpreted, against the recurrence: outputs, final state and all gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels import selective_scan, selective_scan_summary
from headrace.kernels.launch import record_launches
from headrace.kernels.selective_scan import layout, selective_scan_reference
from headrace.kernels.selective_scan.operator import selective_scan_operator
from judge import assert_as_exact

pytestmark = pytest.mark.interpreted

# Tokens of a chunk in tests of what happens between chunks; forward and backward strips divide it.
SHORT_CHUNK = 12


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes few tokens enough for several chunks, and four of these enough for segments."""
    monkeypatch.setattr(layout, "FUSED_CHUNK", SHORT_CHUNK)


def make_tensors(
    B: int, L: int, width: int, N: int, *, skip: bool = True, initial: bool = True, seed: int = 0
) -> list[Tensor | None]:
    """x, dt, A, B, C, D and the initial state, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt_BLI = torch.nn.functional.softplus(normal(B, L, width) - 2)
    tensors = [normal(B, L, width), dt_BLI, -torch.exp(normal(width, N)), normal(B, L, N), normal(B, L, N)]
    return [*tensors, normal(width) if skip else None, normal(B, width, N) if initial else None]


def make_reset(B: int, L: int, *at: int) -> Tensor | None:
    if not at:
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    for row in range(B):
        reset[row, [t + row for t in at if t + row < L]] = True
    return reset


def fused(reset: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *t: selective_scan(*t[:6], initial_state=t[6], reset=reset, backend="triton")


def recurrence(reset: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *t: selective_scan_reference(*t, reset)


@pytest.mark.parametrize(
    ("shape", "resets"),
    [
        ((1, 1, 3, 4), ()),
        ((2, 1, 3, 4), (0,)),
        ((1, 63, 5, 4), (0, 20, 21)),
        ((1, 64, 8, 5), ()),
        ((1, 100, 6, 17), (47, 48, 96)),
    ],
    ids=str,
)
def test_as_exact_as_the_recurrence(shape: tuple[int, ...], resets: tuple[int, ...]) -> None:
    reset = make_reset(*shape[:2], *resets)
    assert_as_exact(fused(reset), recurrence(reset), make_tensors(*shape))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("resets", [(), (0, 11, 12)], ids=str)
def test_rows_and_blocks_of_channels_over_several_chunks(resets: tuple[int, ...]) -> None:
    reset = make_reset(2, 25, *resets)
    with record_launches() as launches:
        assert_as_exact(fused(reset), recurrence(reset), make_tensors(2, 25, 9, 3))
    assert [names_of(launches)] == [["forward", "backward", "sum", "sum"]]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("L", "resets"), [(37, ()), (40, (20, 36))], ids=str)
def test_segments_are_as_exact(L: int, resets: tuple[int, ...]) -> None:
    reset = make_reset(1, L, *resets)
    with record_launches() as launches:
        assert_as_exact(fused(reset), recurrence(reset), make_tensors(1, L, 3, 2))
    scans = ["forward", "compose", "forward", "reverse", "compose", "backward"]
    assert names_of(launches) == [*scans, "sum", "sum"]


def names_of(launches: list) -> list[str]:
    return [launch.name.removeprefix("_selective_scan_").removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize(("skip", "initial"), [(False, True), (True, False), (False, False)])
def test_without_skip_or_initial_state(skip: bool, initial: bool) -> None:
    assert_as_exact(fused(), recurrence(), make_tensors(1, 7, 3, 4, skip=skip, initial=initial))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("used", "L"), [(0, 7), (1, 7), (1, 37)], ids=["output", "state", "state over segments"])
def test_output_or_state_alone_has_gradients(used: int, L: int) -> None:
    assert_as_exact(lambda *t: fused()(*t)[used], lambda *t: recurrence()(*t)[used], make_tensors(1, L, 3, 4))


@pytest.mark.parametrize("N", [40, 70, 130])
def test_large_states(N: int) -> None:
    assert_as_exact(fused(), recurrence(), make_tensors(1, 5, 3, N))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("L", "resets"), [(10, ()), (10, (7,)), (37, ()), (37, (20,))], ids=str)
def test_summary_is_as_exact(L: int, resets: tuple[int, ...]) -> None:
    reset = make_reset(1, L, *resets)

    def summary(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_summary(*tensors, reset=reset, backend="triton")

    def of_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(dt.sum(1)[..., None] * A)
        return decay if reset is None else decay * 0, selective_scan_reference(x, dt, A, B, B, reset=reset)[1]

    tensors = make_tensors(1, L, 3, 2)[:4]
    assert_as_exact(summary, of_recurrence, tensors)
    with torch.no_grad():  # nothing is kept then: composing segments is the end of it
        without_gradients = summary(*(t.float() for t in tensors))
    for actual, expected in zip(without_gradients, of_recurrence(*tensors), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_views_of_a_wider_tensor_are_read_as_they_lie() -> None:
    x, dt, A, B, C, D, _ = (t.float() for t in make_tensors(2, 10, 6, 4))
    wide = torch.cat([x, B, C, dt], 2)
    parts = wide[:, :, :6], wide[:, :, 14:], wide[:, :, 6:10], wide[:, :, 10:14]
    results = []
    with record_launches() as launches:
        for views in (parts, [part.contiguous() for part in parts]):
            leaves = [t.detach().requires_grad_() for t in (views[0], views[1], A, views[2], views[3], D)]
            y, state = selective_scan(*leaves, backend="triton")
            dy = y.detach().mT.contiguous().mT
            results.append([y, state, *torch.autograd.grad([y, state], leaves, [dy, state.detach()])])
    pointers = ("x_ptr", "dt_ptr", "B_ptr", "C_ptr")
    for launch in launches[:2]:
        assert [launch.arguments[name].data_ptr() for name in pointers] == [part.data_ptr() for part in parts]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("L", [20, 37], ids=["one segment", "segments"])
def test_nothing_crosses_a_reset(L: int) -> None:
    start = 15
    x, dt, A, B, C, D, S = (t.float() for t in make_tensors(1, L, 3, 2))
    reset = make_reset(1, L, start)
    results = []
    for factor in (1.0, 3.0, float("nan")):
        leaves = []
        for t in (x, dt, B, C):
            changed = t.clone()
            changed[:, :start] *= factor
            leaves.append(changed.requires_grad_())
        y, state = fused(reset)(leaves[0], leaves[1], A, leaves[2], leaves[3], D, S * factor)
        grads = torch.autograd.grad([y[:, start:].sum(), state.sum()], leaves)
        results.append([y[:, start:], state, *(grad[:, start:] for grad in grads)])
        assert factor != 1.0 or all(grad[:, :start].count_nonzero() == 0 for grad in grads)
    for changed in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], changed, strict=True))


def test_nan_gradients_do_not_cross_a_reset() -> None:
    x, dt, A, B, C, D, S = (t.float().requires_grad_() for t in make_tensors(1, 20, 3, 2))
    y, _ = fused(make_reset(1, 20, 10))(x, dt, A, B, C, D, S)
    dy = torch.ones_like(y)
    dy[:, 15] = float("nan")
    dx, ddt, dS = torch.autograd.grad(y, [x, dt, S], dy)
    assert dx[:, :10].isfinite().all()
    assert ddt[:, :10].isfinite().all()
    assert dS.isfinite().all()
    assert dx[:, 10:16].isnan().all()


def test_nan_stays_nan() -> None:
    x, dt, A, B, C, D, S = (t.float() for t in make_tensors(1, 12, 3, 2))
    x[0, 5, 1] = float("nan")
    y, state = fused()(x, dt, A, B, C, D, S)
    assert y.isnan().nonzero().tolist() == [[0, t, 1] for t in range(5, 12)]
    assert state.isnan().nonzero().tolist() == [[0, 1, 0], [0, 1, 1]]


def test_repeats_bit_for_bit() -> None:
    leaves = [t.float().requires_grad_() for t in make_tensors(1, 10, 9, 2)]
    runs = []
    for _ in range(2):
        y, state = fused()(*leaves)
        runs.append([y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    x, dt, A, B, C, D, S = (t.float().requires_grad_() for t in make_tensors(1, 4, 3, 2))

    def run(x: Tensor, S: Tensor) -> Tensor:
        y, state = fused()(x.sin(), dt, A, B, C, D, S)
        return y.sum() + state.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, S), [x, S])
    for actual, grad in zip(torch.autograd.grad(compiled(x, S), [x, S]), expected, strict=True):
        torch.testing.assert_close(actual, grad)
    for optional in ((C, D, S, make_reset(1, 4, 2)), (None, None, None, None)):
        torch.library.opcheck(selective_scan_operator, (x, dt, A, B, *optional, True, True))


def test_bad_arguments_are_named() -> None:
    x, dt, A, B, C, _, _ = (t.float() for t in make_tensors(2, 6, 3, 2))

    def across(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    wrong = {"x": (across(x), dt, A, B, C), "dt": (x, across(dt), A, B, C)}
    wrong |= {"B": (x, dt, A, across(B), C), "C": (x, dt, A, B, across(C))}
    for name, arguments in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} has strides .* give {name}\.contiguous\(\)"):
            selective_scan(*arguments, backend="triton")
    with pytest.raises(ValueError, match="float64 inputs have no Triton path"):
        selective_scan(x.double(), dt, A, B, C, backend="triton")
    wide = torch.zeros(2, 6, 300)
    with pytest.raises(ValueError, match="state size N=300 is above 256"):
        selective_scan(x, dt, torch.zeros(3, 300), wide, wide, backend="triton")
