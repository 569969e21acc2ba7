"""The 8-bit AdamW kernel, interpreted, beside the PyTorch path."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.kernels.adamw_8bit import BlockGrid, Moments, Update, adamw_8bit_, block_maxima, quantise

pytestmark = pytest.mark.interpreted

UPDATE = Update(
    lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=torch.tensor(3.0), skip=torch.zeros(())
)


def drawn(rows: int, columns: int, blocks: int, block_size: int) -> tuple[Tensor, Tensor, Moments]:
    """Parameter, gradient and moments; scales of `blocks` columns, those of the part's own blocks the first."""
    generator = torch.Generator().manual_seed(rows * columns)
    p, grad, m, v = (torch.randn(rows, columns, generator=generator) for _ in range(4))
    moments = Moments(*quantise(m, True, block_size), *quantise(v.square(), False, block_size))
    padded = [torch.nn.functional.pad(s, (0, blocks - s.shape[1])) for s in (moments.scales1, moments.scales2)]
    return p, grad, moments._replace(scales1=padded[0], scales2=padded[1])


def assert_alike(ours: Moments, theirs: Moments) -> None:
    """Up to a rounding of the moments, which may put one beside a threshold on its other side."""
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype == torch.uint8:
            assert int((a.int() - b.int()).abs().max()) <= 1
            assert float((a != b).float().mean()) < 0.01
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rows", "grid"),
    [
        (3, BlockGrid.whole(64, 16)),
        (5, BlockGrid.whole(100, 32)),  # a short last block
        (1, BlockGrid.whole(1, 256)),
        (7, BlockGrid.whole(40, 256)),  # a row is one block
        (4, BlockGrid(96, 24, 0, 96, 0)),  # no power of two
    ],
    ids=str,
)
def test_equals_the_torch_path(rows: int, grid: BlockGrid) -> None:
    p, grad, moments = drawn(rows, grid.columns, grid.num_blocks, grid.block_size)
    found = {}
    for backend in ("torch", "triton"):
        own_p, own = p.clone(), Moments(*(t.clone() for t in moments))
        adamw_8bit_(own_p, grad, own, UPDATE, grid=grid, backend=backend)
        found[backend] = own_p, own
    torch.testing.assert_close(found["triton"][0], found["torch"][0], rtol=1e-6, atol=1e-7)
    assert_alike(found["triton"][1], found["torch"][1])


@pytest.mark.parametrize(
    "grid",
    [
        BlockGrid(100, 32, 40, 30, 1),  # begins and ends inside blocks
        BlockGrid(64, 256, 48, 16, 0),  # a part of a row's only block
        BlockGrid(96, 64, 60, 8, 0),  # narrower than a block, and in two of them
    ],
    ids=str,
)
def test_parts_of_blocks(grid: BlockGrid) -> None:
    p, grad, moments = drawn(3, grid.columns, 4, grid.block_size)
    maxima = block_maxima(grad, moments, UPDATE, grid=grid, backend="torch")
    torch.testing.assert_close(
        block_maxima(grad, moments, UPDATE, grid=grid, backend="triton"), maxima, rtol=1e-6, atol=0
    )
    found = {}
    for backend in ("torch", "triton"):
        own_p, own = p.clone(), Moments(*(t.clone() for t in moments))
        adamw_8bit_(own_p, grad, own, UPDATE, grid=grid, maxima=2.0 * maxima, backend=backend)
        found[backend] = own_p, own
    torch.testing.assert_close(found["triton"][0], found["torch"][0], rtol=1e-6, atol=1e-7)
    assert_alike(found["triton"][1], found["torch"][1])


def test_a_skipped_update_writes_nothing() -> None:
    p, grad, moments = drawn(3, 40, 3, 16)
    before = p.clone(), [t.clone() for t in moments]
    skip = replace(UPDATE, skip=torch.ones(()))
    adamw_8bit_(p, grad * float("nan"), moments, skip, grid=BlockGrid.whole(40, 16), backend="triton")
    assert torch.equal(p, before[0])
    assert all(torch.equal(a, b) for a, b in zip(moments, before[1], strict=True))
