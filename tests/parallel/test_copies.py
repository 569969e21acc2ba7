"""Copies of parameters are compared bit for bit, and who has others is named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headrace.errors import UserError
from headrace.parallel.copies import CopyCheck, checksums
from headrace.pretrain.checkpoint import latest_checkpoint
from headrace.pretrain.config import Config
from headrace.pretrain.run import build_run
from headrace.pretrain.trainer import train
from tiny import this_world, tiny_config

HOST = os.uname().nodename


def flip(parameter: torch.Tensor, bit: int) -> None:
    local = parameter.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    local.view(torch.int32).view(-1)[-1].bitwise_xor_(1 << bit)


def find_flips(config: Config, flips: dict[int, str], bit: int) -> str:
    """What is said after the ranks in `flips` flipped a bit of the parameter named there."""
    run = build_run(config, this_world())
    try:
        check = CopyCheck(run.engine.named_parameters())
        check.check(1)
        if name := flips.get(dist.get_rank()):
            flip(run.engine.named_parameters()[name], bit)
        with pytest.raises(UserError) as caught:
            check.check(2)
        assert caught.value.everywhere
        return str(caught.value)
    finally:
        run.close(None)


@pytest.mark.fault(
    "a flipped bit in one of several copies of a parameter", "found before the next save; parameter and rank named"
)
@pytest.mark.parametrize(
    ("ranks", "layout", "flips", "holders", "whom"),
    [
        (3, "parallel.dp_replicate=3", {1: "embed.weight"}, "ranks 0-2", f"rank 1 ({HOST}) has other"),
        (2, "parallel.dp_replicate=2", {0: "embed.weight"}, "ranks 0-1", "there is no majority"),
        (4, "parallel.dp_replicate=2", {3: "layers.0.norm.weight"}, "ranks 1, 3", "there is no majority"),
        (2, "parallel.tp=2", {1: "layers.0.norm.weight"}, "ranks 0-1", "there is no majority"),
    ],
    ids=["replicas", "two replicas", "sharded replicas", "tp"],
)
def test_a_flipped_bit_is_found(
    gloo: Callable, tmp_path: Path, data: Path, ranks: int, layout: str, flips: dict[int, str], holders: str, whom: str
) -> None:
    config = tiny_config(tmp_path, data, layout, "train.batch_rows=12")
    for message in gloo(ranks, find_flips, config, flips, 3):
        assert message.startswith(
            f"after step 2, of the copies of {next(iter(flips.values()))} that {holders} ({HOST})"
        )
        assert whom in message


def train_with_a_flip(config: Config) -> str:
    """Rank 1 loses a bit while step 3 is computed."""
    from headrace.pretrain.engine import Engine

    before, calls = Engine.zero_grad, 0

    def zero_grad(self: Engine) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and dist.get_rank() == 1:
            flip(self.named_parameters()["embed.weight"], 0)
        before(self)

    Engine.zero_grad = zero_grad  # type: ignore[method-assign]
    try:
        with pytest.raises(UserError) as caught:
            train(config, this_world())
        return str(caught.value)
    finally:
        Engine.zero_grad = before  # type: ignore[method-assign]


def test_nothing_is_saved_of_it(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """The next comparison would be after step 100; the next save is after step 4."""
    config = tiny_config(tmp_path, data, "parallel.dp_replicate=3", "train.batch_rows=6", "train.checksum_every=100")
    for message in gloo(3, train_with_a_flip, config):
        assert f"rank 1 ({HOST}) has other bits" in message
    assert latest_checkpoint(config.run.folder / "checkpoints").name == "step-00000002"


def test_no_copy_in_memory_is_made_of_it(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """A start would go on from it, and meet the same bits again."""
    memory = (
        "checkpoint.every_steps=0",
        "checkpoint.memory_every_steps=1",
        f"checkpoint.memory_folder={tmp_path}/memory",
    )
    layout = ("parallel.dp_replicate=3", "train.batch_rows=6", "train.checksum_every=100")
    for message in gloo(3, train_with_a_flip, tiny_config(tmp_path, data, *layout, *memory)):
        assert message.startswith("after step 3, of the copies of ")
    copies = {path.name for path in (tmp_path / "memory").rglob("step-*")}
    assert "step-00000002" in copies
    assert copies <= {"step-00000001", "step-00000002"}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, ("parallel.tp=2", "parallel.dp_replicate=2")),
        (4, ("parallel.pp=2", "parallel.dp_replicate=2", "train.micro_batch_rows=1")),
    ],
    ids=["tp", "pp"],
)
def test_a_sound_run_passes(gloo: Callable, tmp_path: Path, data: Path, ranks: int, layout: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path, data, *layout, "train.checksum_every=1", "train.steps=3")
    assert gloo(ranks, train_to_end, config) == [3] * ranks


def train_to_end(config: Config) -> int:
    return train(config, this_world()).step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_one_bit_counts(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, dtype=dtype)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    (before,) = checksums([x.clone()])
    assert int(checksums([x.t()])[0]) == int(before)
    for bit in range(8 * x.element_size()):
        y = x.clone()
        mask = 1 << bit if bit < 8 * x.element_size() - 1 else torch.iinfo(words).min
        y.view(words)[3, 2] ^= mask
        assert int(checksums([y])[0]) != int(before)
