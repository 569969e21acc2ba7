"""Averaged weights: the recurrence, under sharding, over a resume, and in what reads a run."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from headrace.errors import UserError
from headrace.pretrain.average import WeightAverage
from headrace.pretrain.checkpoint import load_full
from headrace.pretrain.hf import export_hf
from headrace.pretrain.run import checkpoints
from headrace.pretrain.saved_run import load_run
from tiny import tiny_config, train_tiny

EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=99", "train.average_decay=0.7")


def test_skipped_updates_leave_it() -> None:
    weights = {"w": torch.ones(3)}
    average = WeightAverage(weights, 0.5)
    weights["w"].fill_(2.0)
    average.update(torch.ones(()))
    assert average.state()["w"].tolist() == [1.0] * 3
    average.update(torch.zeros(()))
    assert average.state()["w"].tolist() == [1.5] * 3


@pytest.mark.parametrize(("ranks", "layout"), [(1, ()), (4, ("parallel.tp=2",))])
def test_is_the_recurrence_over_all_checkpoints(
    gloo: Callable, tmp_path: Path, data: Path, ranks: int, layout: tuple[str, ...]
) -> None:
    config = tiny_config(tmp_path, data, *EVERY_STEP, *layout)
    gloo(ranks, train_tiny, config, 2)
    gloo(ranks, train_tiny, config, 5)
    found = [load_full(checkpoints(config) / f"step-{step:08}") for step in range(1, 6)]
    for name in (name for name in found[0] if name.startswith("model.")):
        kept = name.replace("model.", "average.", 1)
        for before, after in pairwise(found):
            torch.testing.assert_close(after[kept], 0.7 * before[kept] + 0.3 * after[name], rtol=1e-6, atol=1e-7)
    model, _, _ = load_run(config.run.folder, average=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[-1][f"average.{name}"])
    assert "loads in transformers" in str(export_hf(config.run.folder, average=True))


def test_a_run_without_says_so(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    gloo(1, train_tiny, config, 2)
    with pytest.raises(UserError, match="keeps no averaged weights"):
        load_run(config.run.folder, average=True)
