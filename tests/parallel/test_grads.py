"""The global gradient norm: exact under sharding, one collective."""

from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from headrace.parallel.grads import clip_gradients, global_norm

SHAPES = [(5, 3), (1, 4), (7,), (2, 2, 2)]


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def clip_on_mesh(mesh_shape: tuple[int, ...]) -> tuple[float, list[torch.Tensor], int]:
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Replicate(), Shard(0)][-len(mesh_shape) :]
    sharded = [distribute_tensor(g, mesh, placements, src_data_rank=None) for g in gradients()]
    with CommDebugMode() as counts:
        norm = clip_gradients(sharded, 0.5)
    return float(norm), [g.full_tensor() for g in sharded], counts.get_total_counts()


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (4,), (2, 2)])
def test_norm_and_clipping_equal_one_process(gloo: Callable, mesh_shape: tuple[int, ...]) -> None:
    whole = gradients()
    expected = torch.cat([g.flatten() for g in whole]).norm()
    for norm, clipped, collectives in gloo(int(torch.tensor(mesh_shape).prod()), clip_on_mesh, mesh_shape):
        assert norm == pytest.approx(float(expected), rel=1e-6)
        assert torch.cat([g.flatten() for g in clipped]).norm() == pytest.approx(0.5, rel=1e-5)
        assert collectives == 1


def test_small_gradients_and_no_limit_stay() -> None:
    small, large = gradients(), gradients()
    clip_gradients(small, 1e6)
    clip_gradients(large, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(small, gradients(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(large, gradients(), strict=True))


def test_a_nan_shows_in_the_norm() -> None:
    bad = gradients()
    bad[1][0, 2] = float("nan")
    assert global_norm(bad).isnan()
