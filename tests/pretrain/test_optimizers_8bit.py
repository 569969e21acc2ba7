"""8-bit AdamW on sharded parameters: the same codes and scales under every layout."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.adamw_8bit import AdamW8bit

SHAPES = {"wide": (6, 80), "tall": (50, 16), "ragged": (7, 36), "stack": (4, 6, 40), "one_row": (1, 64)}
DECAY = dict.fromkeys(SHAPES, 0.1) | {"tall": 0.0}
BLOCK = 16
STEPS = 4
GO, SKIP = torch.zeros(()), torch.ones(())
State = dict[str, torch.Tensor]
# Mesh sizes, and where (dimension 0 for FSDP, another for tensor parallelism) each of its dimensions cuts.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "dp2": ((2,), (0,)),
    "dp4": ((4,), (0,)),
    "tp2 along rows": ((2,), (-1,)),
    "tp4 along rows": ((4,), (-1,)),
    "replicas, dp2": ((2, 2), (None, 0)),
    "dp2, tp2 along rows": ((2, 2), (0, -1)),
    "tp2 along rows, dp2": ((2, 2), (-1, 0)),
}


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(parameters: State) -> AdamW8bit:
    return AdamW8bit(parameters, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, block_size=BLOCK)


def run_steps(parameters: State, shard: Callable[[torch.Tensor], torch.Tensor]) -> AdamW8bit:
    optimizer = build(parameters)
    for step in range(STEPS):
        for name, grad in draw(100 + step).items():
            parameters[name].grad = shard(grad)
        optimizer.step(1.0 - 0.1 * step, GO)
    return optimizer


def whole(tensors: State) -> State:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def sharded_runs(layouts: list[str]) -> list[tuple[State, State, list[int]]]:
    """Parameters and state after the steps, whole, and the lengths of the messages of one more update."""
    found = []
    for layout in layouts:
        sizes, cuts = LAYOUTS[layout]
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])

        def shard(tensor: torch.Tensor, mesh=mesh, cuts=cuts) -> DTensor:
            dims = [None if cut is None else cut % tensor.ndim for cut in cuts]
            placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        parameters: State = {name: shard(tensor) for name, tensor in draw(0).items()}
        optimizer = run_steps(parameters, shard)
        result = whole(parameters), whole(optimizer.state())
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            optimizer.step(1.0, SKIP)
        found.append((*result, [call.args[0].numel() for call in all_reduce.mock_calls]))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_layout_changes_a_bit(gloo: Callable, ranks: int) -> None:
    expected = draw(0)
    expected_state = run_steps(expected, lambda grad: grad).state()
    layouts = [name for name, (sizes, _) in LAYOUTS.items() if torch.tensor(sizes).prod() == ranks]
    for result in gloo(ranks, sharded_runs, layouts):
        for layout, (parameters, state, _) in zip(layouts, result, strict=True):
            assert state.keys() == expected_state.keys()
            for name, tensor in (expected | expected_state).items():
                assert torch.equal((parameters | state)[name], tensor), (layout, name)


def test_only_cuts_inside_blocks_send_anything(gloo: Callable) -> None:
    """The scales of such parameters, in one message; of 64 columns over two ranks no block is cut, of others one is."""
    for result in gloo(2, sharded_runs, ["dp2", "tp2 along rows"]):
        (*_, over_rows), (*_, over_columns) = result
        assert over_rows == []
        scales = {name: torch.Size(shape[:-1]).numel() * -(-shape[-1] // BLOCK) for name, shape in SHAPES.items()}
        assert over_columns == [2 * (sum(scales.values()) - scales["one_row"])]


def test_close_to_32_bits() -> None:
    ours, exact = draw(0), draw(0)
    adamw = AdamW(exact, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    eight = build(ours)
    for step in range(20):
        for name, grad in draw(100 + step).items():
            ours[name].grad, exact[name].grad = grad.clone(), grad.clone()
        eight.step(1.0, GO)
        adamw.step(1.0, GO)
    start = draw(0)
    for name in SHAPES:
        moved = (exact[name] - start[name]).norm()
        assert (ours[name] - exact[name]).norm() < 0.05 * moved


def test_a_skipped_step_changes_nothing() -> None:
    parameters = draw(0)
    optimizer = run_steps(parameters, lambda grad: grad)
    before, state_before = copy.deepcopy(parameters), copy.deepcopy(optimizer.state())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(1.0, SKIP)
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    assert all(torch.equal(tensor, state_before[name]) for name, tensor in optimizer.state().items())


def test_two_bytes_and_a_little() -> None:
    parameters = {"matrix": torch.zeros(64, 2560)}
    optimizer = AdamW8bit(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay={"matrix": 0.0})
    size = sum(tensor.numel() * tensor.itemsize for tensor in optimizer.state().values())
    assert size == 2 * 64 * (2560 + 10 * 4) + 4
    assert size / parameters["matrix"].numel() < 2.04
