"""The embedding: its PyTorch path, and its kernels, interpreted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels import embedding
from headrace.kernels.embedding import embedding_reference
from headrace.kernels.launch import record_launches
from judge import assert_as_exact, poisoned_memory

fused = pytest.mark.interpreted
BACKENDS = ["torch", pytest.param("triton", marks=fused)]


def tokens_of(kind: str, T: int, V: int) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    uniform = torch.randint(V, (T,), generator=generator)
    return {
        "uniform": uniform,
        "equal": torch.full((T,), V // 2),
        "frequent": torch.where(torch.rand(T, generator=generator) < 0.7, V - 1, uniform),
        "sorted": torch.arange(T) * V // T,
    }[kind]


def gradient(tokens: Tensor, weight: Tensor, backend: str) -> Tensor:
    leaf = weight.detach().requires_grad_()
    y = embedding(tokens, leaf, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uniform", "equal", "frequent", "sorted"])
@pytest.mark.parametrize("length", [1, 63, 64, 100])
def test_as_exact_as_the_definition(kind: str, length: int, backend: str) -> None:
    tokens = tokens_of(kind, length, 37)
    weight = torch.randn(37, 20, dtype=torch.float64)
    assert_as_exact(lambda w: embedding(tokens, w, backend=backend), lambda w: embedding_reference(tokens, w), [weight])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "V", "D"), [((), 3, 1), ((0,), 3, 17), ((2, 9), 260, 5), ((2, 9), 1, 40), ((2, 3, 4), 70, 17)], ids=str
)
def test_any_shape(shape: tuple[int, ...], V: int, D: int, backend: str) -> None:
    tokens = torch.randint(V, shape)
    weight = torch.randn(V, D, dtype=torch.float64)
    assert_as_exact(lambda w: embedding(tokens, w, backend=backend), lambda w: embedding_reference(tokens, w), [weight])


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_tokens_are_the_same_tokens(backend: str) -> None:
    tokens, weight = tokens_of("frequent", 50, 9), torch.randn(9, 6)
    wide, narrow = (gradient(t, weight, backend) for t in (tokens, tokens.int()))
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_and_whatever_other_rows_get(backend: str) -> None:
    tokens, weight = tokens_of("frequent", 200, 20), torch.randn(20, 6)
    with poisoned_memory():
        one, two = (gradient(tokens, weight, backend) for _ in range(2))
    assert torch.equal(one, two)
    assert (one[torch.bincount(tokens, minlength=20) == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    tokens = torch.zeros(4096, dtype=torch.int64)
    weight = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    y = embedding(tokens, weight)
    y.backward(torch.full_like(y, 0.01))
    expected = torch.tensor(0.01, dtype=dtype).float() * 4096
    torch.testing.assert_close(weight.grad, expected.to(dtype).expand(3, 2) * torch.tensor([[1], [0], [0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    tokens = torch.tensor([1, 2] * 20 + [0])
    weight = torch.zeros(4, 3, requires_grad=True)
    dy = torch.ones(41, 3)
    dy[10, 1] = float("nan")
    (grad,) = torch.autograd.grad(embedding(tokens, weight, backend=backend), weight, dy)
    assert grad.isnan().nonzero().tolist() == [[1, 1]]


@fused
def test_long_runs_are_summed_by_many_programs() -> None:
    tokens, weight = torch.zeros(100, dtype=torch.int64), torch.randn(5, 16)
    with record_launches() as launches:
        gradient(tokens, weight, "triton")
    starts, chunks, _ = launches
    assert starts.arguments["halvings"] == 7
    assert chunks.grid == (12,)
    assert chunks.arguments["CHUNK"] == 8


@pytest.mark.parametrize("is_fused", [False, pytest.param(True, marks=fused)])
def test_compiles_as_one_graph_and_passes_opcheck(is_fused: bool) -> None:
    tokens, weight = tokens_of("uniform", 12, 7).view(3, 4), torch.randn(7, 5, requires_grad=True)
    function: Callable = lambda w: embedding(tokens, w.sin(), backend="triton" if is_fused else "torch").cos()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), function(weight))
    for a, e in zip(*(torch.autograd.grad(f(weight).sum(), weight) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(a, e)
    torch.library.opcheck(torch.ops.headrace.embedding.default, (tokens, weight, is_fused))


def test_bad_arguments_are_named() -> None:
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"tokens are torch\.float32"):
        embedding(torch.zeros(2), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        embedding(torch.zeros(2, dtype=torch.int64), weight[:, 0])
    with pytest.raises(IndexError):
        embedding(torch.tensor([4]), weight)
