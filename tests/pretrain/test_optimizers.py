"""Optimizers: the same update as torch's own, under every sharding, and none at all for a skipped step."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.config import MuonConfig
from headrace.pretrain.optimizers.muon import Muon, orthogonalise

SHAPES = {"wide": (6, 10), "tall": (10, 6), "twin": (6, 10), "thin": (3, 8), "vector": (7,), "scalar_row": (1, 5)}
DECAY = {name: 0.1 if len(shape) == 2 else 0.0 for name, shape in SHAPES.items()}
STEPS = 5
GO = torch.zeros(())
SKIP = torch.ones(())


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def matrices(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}


def build(kind: str, parameters: dict[str, torch.Tensor]) -> AdamW | Muon:
    if kind == "muon":
        return Muon(matrices(parameters), MuonConfig(lr=0.02), weight_decay=DECAY)
    return AdamW(parameters, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)


def run_steps(kind: str, parameters: dict[str, torch.Tensor], shard: Callable) -> dict[str, torch.Tensor]:
    optimizer = build(kind, parameters)
    for step in range(STEPS):
        for name, grad in draw(100 + step).items():
            parameters[name].grad = shard(grad)
        optimizer.step(1.0 - 0.1 * step, GO)
    return optimizer.state()


def torch_reference(kind: str) -> dict[str, torch.Tensor]:
    """Five steps of torch's own optimizers on whole tensors."""
    parameters = draw(0)
    if kind == "muon":
        inner: torch.optim.Optimizer = torch.optim.Muon(
            matrices(parameters).values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
    else:
        groups = [
            {"params": list(matrices(parameters).values()), "weight_decay": 0.1},
            {"params": [parameters["vector"]], "weight_decay": 0.0},
        ]
        inner = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(STEPS):
        for name, grad in draw(100 + step).items():
            parameters[name].grad = grad
        for group in inner.param_groups:
            group["lr"] = 0.02 * (1.0 - 0.1 * step)
        inner.step()
    return parameters


def plain_run(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    parameters = draw(0)
    state = run_steps(kind, parameters, lambda grad: grad)
    return parameters, state


@pytest.mark.parametrize(("kind", "tolerance"), [("adamw", 1e-12), ("muon", 3e-2)])
def test_equals_torch(kind: str, tolerance: float) -> None:
    """torch's Muon orthogonalises in bfloat16, so it is an oracle only to that precision."""
    ours, expected = plain_run(kind)[0], torch_reference(kind)
    start = draw(0)
    for name in matrices(expected) if kind == "muon" else expected:
        moved = (expected[name] - start[name]).norm()
        assert (ours[name] - expected[name]).norm() <= tolerance * moved, name


def sharded_run(kind: str, mesh_shape: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    placements = [Replicate(), Shard(0)][-len(mesh_shape) :]

    def shard(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    parameters: dict[str, torch.Tensor] = {name: shard(tensor) for name, tensor in draw(0).items()}
    state = run_steps(kind, parameters, shard)
    whole = {name: tensor.full_tensor() for name, tensor in parameters.items()}  # type: ignore[attr-defined]
    whole_state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    assert dist.get_world_size() == mesh.size()
    return whole, whole_state


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (4,), (2, 2)])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharding_does_not_change_the_update(gloo: Callable, kind: str, mesh_shape: tuple[int, ...]) -> None:
    expected, expected_state = plain_run(kind)
    world_size = int(torch.tensor(mesh_shape).prod())
    for parameters, state in gloo(world_size, sharded_run, kind, mesh_shape):
        for name in expected:
            torch.testing.assert_close(parameters[name], expected[name], rtol=1e-12, atol=1e-12)
        assert state.keys() == expected_state.keys()
        for name in expected_state:
            torch.testing.assert_close(state[name], expected_state[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(kind: str) -> None:
    parameters = draw(0)
    optimizer = build(kind, parameters)
    for name, grad in draw(1).items():
        parameters[name].grad = grad
    optimizer.step(1.0, GO)
    before, state_before = copy.deepcopy(parameters), copy.deepcopy(optimizer.state())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(1.0, SKIP)
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    assert all(torch.equal(tensor, state_before[name]) for name, tensor in optimizer.state().items())


def test_gradients_do_not_outlive_the_update() -> None:
    parameters = draw(0)
    optimizer = build("adamw", parameters)
    for name, grad in draw(1).items():
        parameters[name].grad = grad
    optimizer.step(1.0, GO)
    assert all(local.grad is None for local in optimizer.local.values())


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (1, 5)])
def test_orthogonalise_keeps_directions_and_levels_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrix, 5)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    levelled = u.mT @ out @ vh.mT
    sizes = levelled.diagonal(dim1=-2, dim2=-1)
    assert sizes.min() > 0.3
    assert sizes.max() < 1.3
    assert (levelled - torch.diag_embed(sizes)).abs().max() < 1e-6
