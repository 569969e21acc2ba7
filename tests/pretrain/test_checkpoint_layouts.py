"""Checkpoints over process groups: any layout into any other, bit for bit, and failures that reach every rank."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from headrace.pretrain.checkpoint import (
    CheckpointDamagedError,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_full,
    pieces,
    read_extra,
    read_rank_tensors,
    save_checkpoint,
    storage,
)

SHAPES = {"a": (8, 6), "uneven": (7, 5), "few": (1, 9), "vector": (3,), "none": (0, 4), "deep": (5, 4, 3)}
LAYOUTS = ["plain", "rows", "columns", "replicate", "grid", "hybrid", "strided"]


def full_tensors() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    tensors = {f"model.{name}": torch.randn(shape, generator=source) for name, shape in SHAPES.items()}
    tensors["model.half"] = torch.randn(6, 2, generator=source).bfloat16()
    tensors["optim.count"] = torch.arange(11)
    tensors["optim.step"] = torch.tensor(5.0)
    return tensors


def _spread(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`tensor` in a layout, over all ranks; scalars and vectors stay plain where the layout splits columns."""
    size = dist.get_world_size()
    if layout == "plain" or tensor.ndim == 0 or (tensor.ndim == 1 and layout in ("columns", "grid")):
        return tensor.clone()
    if layout in ("rows", "columns", "replicate"):
        placement = {"rows": Shard(0), "columns": Shard(1), "replicate": Replicate()}[layout]
        return distribute_tensor(tensor, init_device_mesh("cpu", (size,)), [placement])
    mesh = init_device_mesh("cpu", (size // 2 or 1, min(size, 2)), mesh_dim_names=("dp", "tp"))
    if layout == "strided":  # as FSDP2 lays out a tensor-parallel parameter: rows by tp first, then by dp within
        module = torch.nn.Module()
        if not tensor.is_floating_point():
            return tensor.clone()
        module.weight = torch.nn.Parameter(distribute_tensor(tensor, mesh["tp"], [Shard(0)]))
        fully_shard(module, mesh=mesh["dp"])
        return module.weight
    return distribute_tensor(tensor, mesh, [Shard(0), Shard(1)] if layout == "grid" else [Replicate(), Shard(0)])


def _save_as(folder: str, layout: str) -> None:
    tensors = {name: _spread(tensor, layout) for name, tensor in full_tensors().items()}
    save_checkpoint(
        folder,
        7,
        tensors,
        extra={"layout": layout, "from": dist.get_rank()},
        rank_tensors={"rng": torch.full((4,), dist.get_rank(), dtype=torch.uint8)},
    )


def _load_as(path: str, layout: str) -> list[str]:
    """Loads into `layout`; the names of tensors that are not bit for bit what was saved."""
    wanted = full_tensors()
    tensors = {name: _spread(torch.full_like(tensor, 77), layout) for name, tensor in wanted.items()}
    load_checkpoint(path, tensors)
    found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return [name for name, tensor in wanted.items() if not torch.equal(found[name].detach(), tensor)]


def _assert_full(path: Path) -> None:
    found = load_full(path)
    for name, tensor in full_tensors().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("layout", "world_size"), [("plain", 2), *itertools.product(LAYOUTS[1:], (1, 2, 4))])
def test_any_layout_loads_into_any_other(gloo, tmp_path, layout, world_size):
    gloo(world_size, _save_as, str(tmp_path), layout)
    path = tmp_path / "step-00000007"
    _assert_full(path)
    assert read_extra(path) == {"layout": layout, "from": 0}
    for rank in range(world_size):
        assert (read_rank_tensors(path, rank) or {})["rng"].tolist() == [rank] * 4
    assert read_rank_tensors(path, world_size) is None
    # One other layout at each other size: over the parameters every pair of neighbours in the list meets.
    for other_size, shift in [(1, 0), (2, 1), (4, 2)]:
        other = LAYOUTS[(LAYOUTS.index(layout) + shift + world_size) % len(LAYOUTS)]
        assert gloo(other_size, _load_as, str(path), other) == [[]] * other_size, (other, other_size)


def test_replicas_are_written_once(gloo, tmp_path):
    gloo(4, _save_as, str(tmp_path), "hybrid")
    body = json.loads((tmp_path / "step-00000007" / "manifest.json").read_text())
    rows = sum(file["bytes"] - file["header_bytes"] for file in body["files"].values())
    assert rows == sum(t.numel() * t.itemsize for t in full_tensors().values()) + 4 * 4
    assert len(body["tensors"]["model.a"]["pieces"]) == 2
    assert len(body["tensors"]["model.few"]["pieces"]) == 1


class Net(torch.nn.Module):
    """Rows that do not divide by the ranks, and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 7)
        self.second = torch.nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def _trained(steps: int, seed: int = 1) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    fully_shard(model.first)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(steps):
        _step(model, optimizer)
    return model, optimizer


def _step(model: Net, optimizer: torch.optim.Optimizer) -> float:
    x = torch.linspace(-1, 1, 30).view(5, 6)  # the same on every rank: the mean gradient is that of one process
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _state(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for slot, value in optimizer.state[parameter].items():
            tensors[f"optim.{slot}.{name}"] = value
    return tensors


def _full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def _train_and_save(folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, optimizer = _trained(3)
    saved = _full(_state(model, optimizer))
    save_checkpoint(folder, 3, _state(model, optimizer), extra={})
    return saved, [_step(model, optimizer) for _ in range(4)]


def _resume(path: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, optimizer = _trained(1, seed=2)
    load_checkpoint(path, _state(model, optimizer))
    return _full(_state(model, optimizer)), [_step(model, optimizer) for _ in range(4)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fsdp_training_resumes_at_any_size(gloo, tmp_path, world_size):
    saved, losses = gloo(world_size, _train_and_save, str(tmp_path))[0]
    path = tmp_path / "step-00000003"
    whole = load_full(path)
    assert whole.keys() == saved.keys()
    assert all(torch.equal(whole[name], saved[name]) for name in saved)
    for other_size in (1, 2, 4):
        for loaded, resumed in gloo(other_size, _resume, str(path)):
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
            if other_size == world_size:
                assert resumed == losses
            else:
                torch.testing.assert_close(torch.tensor(resumed), torch.tensor(losses))


def _full_disk_on(folder: str, victim: int) -> tuple[str, str]:
    tensors = {"a": distribute_tensor(torch.ones(8, 2), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])}
    save_checkpoint(folder, 1, tensors, extra={})

    def full(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == victim:
            patch.setattr(pieces, "_write", full)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(folder, 2, tensors, extra={}, keep_last=1)
    dist.barrier()
    load_checkpoint(list_checkpoints(folder)[-1], tensors)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.fault(
    "a disk that is full on one of three ranks", "not saved, in one line on all; the earlier checkpoint is whole"
)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_full_disk_on_one_rank_reaches_all(gloo, tmp_path, victim):
    (first, *others) = gloo(3, _full_disk_on, str(tmp_path), victim, timeout_s=20)
    assert others == [first] * 2
    assert "No space left on device" in first[1]
    assert f"rank {victim}" in first[1]
    assert "step-00000001" in first[1]
    assert "\n" not in first[1]
    assert os.listdir(tmp_path) == ["step-00000001"]


def _fail_in_finish(folder: str) -> str:
    def broken(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "publish", broken)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(folder, 1, {"a": torch.ones(2)}, extra={})
    dist.barrier()
    return str(caught.value)


def test_a_failed_rename_reaches_all(gloo, tmp_path):
    first, second = gloo(2, _fail_in_finish, str(tmp_path), timeout_s=20)
    assert first == second
    assert "Read-only" in first
    assert os.listdir(tmp_path) == []


def _load_expecting_failure(path: str, rows_on_rank_1: int) -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {"model.a": distribute_tensor(torch.zeros(8, 6), mesh, [Shard(0)])}
    if dist.get_rank() == 1 and rows_on_rank_1:
        tensors["optim.count"] = torch.zeros(rows_on_rank_1, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, tensors)
    dist.barrier()
    return type(caught.value).__name__, str(caught.value)


def test_damage_that_only_one_rank_meets_reaches_all(gloo, tmp_path):
    gloo(2, _save_as, str(tmp_path), "rows")
    path = tmp_path / "step-00000007"
    (name, words), other = gloo(2, _load_expecting_failure, str(path), 12, timeout_s=20)
    assert other == (name, words)
    assert name == CheckpointError.__name__
    assert "shape [11], wanted [12]" in words
    file = path / "rank-00001.safetensors"
    whole = bytearray(file.read_bytes())
    at = whole.index(full_tensors()["model.a"][4:].numpy().tobytes())
    whole[at] ^= 1
    file.write_bytes(whole)
    (name, words), other = gloo(2, _load_expecting_failure, str(path), 0, timeout_s=20)
    assert other == (name, words)
    assert name == CheckpointDamagedError.__name__
    assert "rank-00001.safetensors is not what was written" in words
