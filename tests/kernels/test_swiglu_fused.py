"""The SwiGLU kernels, interpreted."""

import pytest
import torch

from headrace.kernels.activations import swiglu, swiglu_reference
from judge import assert_as_exact

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (4, 100), (2, 3, 37)], ids=str)
def test_as_exact_as_the_definition(shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) * 3 for _ in range(2)]
    assert_as_exact(lambda *t: swiglu(*t, backend="triton"), swiglu_reference, tensors)


def test_nan_stays_nan() -> None:
    gate, up = torch.ones(2, 5), torch.ones(2, 5)
    gate[1, 2] = float("nan")
    assert swiglu(gate, up, backend="triton").isnan().nonzero().tolist() == [[1, 2]]


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    gate, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    compiled = torch.compile(lambda g, u: swiglu(g.sin(), u, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), swiglu(gate.sin(), up))
    torch.library.opcheck(torch.ops.headrace.swiglu.default, (gate, up, True))
