"""The SSD operator inside PyTorch: compile, fake tensors, checkpointing, and the memory it takes and keeps."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from headrace.kernels import ssd_scan
from headrace.kernels.ssd.chunked import ssd_chunked_forward
from headrace.kernels.ssd.chunked_backward import Inputs, ssd_chunked_backward
from headrace.kernels.ssd.operator import ssd_chunked


def make_inputs(B: int = 2, L: int = 70, H: int = 4, P: int = 4, G: int = 2, N: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    dt_BLH, A_H = torch.rand(B, L, H) * 0.5, -torch.rand(H) - 0.1
    tensors = [torch.randn(B, L, H, P), dt_BLH, A_H, torch.randn(B, L, G, N), torch.randn(B, L, G, N), torch.randn(H)]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize("optional", ["all", "none", "no output"])
def test_opcheck(optional: str, keep_states: bool) -> None:
    x, dt, A, B, C, D = make_inputs()
    state = torch.randn(2, 4, 4, 3, requires_grad=True)
    reset = torch.rand(2, 70) < 0.1
    arguments = {
        "all": (x, dt, A, B, C, D, state, reset, 64, keep_states),
        "none": (x, dt, A, B, C, None, None, None, 64, keep_states),
        "no output": (x, dt, A, B, None, None, None, reset, 64, keep_states),
    }[optional]
    torch.library.opcheck(ssd_chunked, arguments)


def test_opcheck_of_the_backward() -> None:
    inputs = [t.detach() for t in make_inputs()]
    y, state, states = ssd_chunked(*inputs, None, None, 64, True)
    backward = torch.ops.headrace.ssd_chunked_backward
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (y, state, *inputs, None, None, states, 64), test_utils=tests)
    torch.library.opcheck(backward, (None, state, *inputs[:4], None, None, None, None, states, 64), test_utils=tests)


def loss_of(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    y, state = ssd_scan(torch.sin(x), dt, A, B, C, D)
    return y.square().sum() + state.square().sum()


def test_compiles_as_one_graph() -> None:
    inputs = make_inputs()
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for actual, grad in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(actual, grad)


def test_fake_tensors_flow_through() -> None:
    with FakeTensorMode():
        inputs = make_inputs(L=1000)
        loss_of(*inputs).backward()
        assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


def never_recompute_the_scan(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    is_scan = op == torch.ops.headrace.ssd_chunked.default
    return CheckpointPolicy.MUST_SAVE if is_scan else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_gradients_are_bit_identical(selective: bool) -> None:
    inputs = make_inputs()
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    options = {}
    if selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(never_recompute_the_scan)
    loss = checkpoint(loss_of, *inputs, use_reentrant=False, **options)
    for actual, grad in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert torch.equal(actual, grad)


def test_repeated_runs_are_bit_identical() -> None:
    inputs = make_inputs(L=300)
    first, second = (torch.autograd.grad(loss_of(*inputs), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_and_output_gradients_are_left_alone() -> None:
    inputs = make_inputs()
    state = torch.randn(2, 4, 4, 3, requires_grad=True)
    dy, dstate = torch.randn(2, 70, 4, 4), torch.randn(2, 4, 4, 3)
    before = [t.detach().clone() for t in (*inputs, state, dy, dstate)]
    outputs = ssd_scan(*inputs, initial_state=state)
    torch.autograd.grad(outputs, [*inputs, state], [dy, dstate])
    assert all(torch.equal(a, b) for a, b in zip((*inputs, state, dy, dstate), before, strict=True))


def test_strided_inputs_equal_contiguous_ones() -> None:
    x, dt, A, B, C, D = (t.detach() for t in make_inputs(G=1))
    joined = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2), dt], dim=2).requires_grad_()
    x_part, B_part, C_part, dt_part = joined.split([16, 3, 3, 4], dim=2)
    y, _ = ssd_scan(x_part.unflatten(2, (4, 4)), dt_part, A, B_part[:, :, None], C_part[:, :, None], D)
    assert torch.equal(y, ssd_scan(x, dt, A, B, C, D)[0])
    y.transpose(1, 2).contiguous().sum().backward()
    assert joined.grad.isfinite().all()

    along_time = [
        t.permute(*range(2, t.dim()), 0, 1).contiguous().permute(-2, -1, *range(t.dim() - 2)) for t in (x, B, C)
    ]
    assert along_time[0].stride(1) == 1
    y_along_time, _ = ssd_scan(along_time[0], dt, A, *along_time[1:], D)
    assert torch.equal(y_along_time, y)


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass of `run`."""
    storages: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        kept = run()
    assert kept is not None
    return sum(storages.values())


@pytest.mark.parametrize("keep_states", [True, False])
def test_kept_memory_is_inputs_and_chunk_states(keep_states: bool) -> None:
    for L in (256, 1024):
        inputs = make_inputs(1, L, H=8, P=64, G=1, N=64)
        given = sum(t.numel() * 4 for t in inputs)
        states = L // 64 * 8 * 64 * 64 * 4 if keep_states else 0
        assert saved_bytes(lambda: ssd_scan(*inputs, keep_states=keep_states)) == given + states  # noqa: B023


def test_nothing_is_kept_without_gradients() -> None:
    inputs = [t.detach() for t in make_inputs(1, 256, H=8, P=64, G=1, N=64)]
    assert saved_bytes(lambda: ssd_scan(*inputs)) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: ssd_scan(*make_inputs())) == 0


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages created inside it: `now` those alive, `peak` the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.known:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_peak_memory_is_linear_in_length() -> None:
    def peak(L: int, keep_states: bool) -> int:
        x, dt, A, B, C, D = (t.detach() for t in make_inputs(1, L, H=8, P=32, G=1, N=32))
        dy = torch.randn_like(x)
        with PeakMemory() as memory:
            _, _, states = ssd_chunked_forward(x, dt, A, B, C, D, None, None, 64)
            inputs = Inputs(x, dt, A, B, C, D, None, None)
            ssd_chunked_backward(dy, None, inputs, states if keep_states else None, 64)
        return memory.peak

    for keep_states in (True, False):
        peaks = {L: peak(L, keep_states) for L in (1024, 2048, 4096)}
        assert 0 < peaks[2048] <= 2.02 * peaks[1024]
        assert peaks[4096] <= 2.02 * peaks[2048]
        all_pairs_within_chunks = 4096 * 32 * 8 * 4
        assert peaks[4096] - peaks[2048] < 8 * all_pairs_within_chunks
