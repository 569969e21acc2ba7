"""Saves are as far apart as their measured cost says, on all ranks after the same steps."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.pretrain import save_interval
from headrace.pretrain.config import Config
from headrace.pretrain.save_interval import FIRST_S, SaveInterval
from tiny import records, tiny_config, train_tiny


class Clock:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_interval_follows_from_cost_and_failures() -> None:
    clock = Clock()
    interval = SaveInterval(0.01, 7200.0, clock)
    clock.seconds = FIRST_S - 1
    assert not interval.is_due()
    clock.seconds = FIRST_S
    assert interval.is_due()
    interval.begin()
    interval.add(0.25, 5.0)
    assert interval.seconds == math.sqrt(2 * 0.25 * 7200)  # 60 s; the share alone would allow one in 25 s
    clock.seconds = FIRST_S + interval.seconds - 1
    assert not interval.is_due()
    clock.seconds += 1
    assert interval.is_due()


def test_saves_cost_no_more_than_their_share_and_never_overlap() -> None:
    dear = SaveInterval(0.01, 100.0, Clock())
    dear.add(10.0, 0.0)
    assert dear.seconds == 1000.0
    slow = SaveInterval(0.01, 100.0, Clock())
    slow.add(0.01, 600.0)
    assert slow.seconds == 1200.0


def test_one_slow_save_does_not_move_the_interval() -> None:
    interval = SaveInterval(0.01, 1e6, Clock())
    for blocked_s in (0.5, 0.5, 30.0, 0.5, 0.5):
        interval.add(blocked_s, 0.0)
    assert interval.seconds == 1000.0


def run(config: Config) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_interval, "FIRST_S", 0.0)
        return train_tiny(config)


def run_dear(config: Config) -> int:
    """Due at once, and after the first save hardly ever."""
    begin = SaveInterval.begin

    def begin_and_wait(self: SaveInterval) -> None:
        begin(self)
        save_interval.FIRST_S = math.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_interval, "FIRST_S", 0.0)
        patch.setattr(SaveInterval, "begin", begin_and_wait)
        return train_tiny(config)


def test_what_is_due_is_saved_once(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Between the step in which the first rank finds it due and that in which all know, it is still to be done."""
    options = ("checkpoint.every_steps=0", "train.steps=12", "checkpoint.time_share=0.01")
    config = tiny_config(tmp_path, data, *options, "checkpoint.failure_every_s=1e12")
    assert gloo(2, run_dear, config) == [12, 12]
    assert saves(config) == [2, 12]


def saves(config: Config) -> list[int]:
    return [record["step"] for record in records(config, "save")]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_all_ranks_save_when_the_first_finds_it_due(
    gloo: Callable, tmp_path: Path, data: Path, asynchronous: str
) -> None:
    options = ("checkpoint.every_steps=0", "train.steps=12", f"checkpoint.asynchronous={asynchronous}")
    often = ("checkpoint.time_share=0.5", "checkpoint.failure_every_s=1e-6")
    config = tiny_config(tmp_path, data, *options, *often)
    assert gloo(2, run, config) == [12, 12]
    found = saves(config)
    assert found[0] <= 2
    assert found[-1] == 12
    plain = tiny_config(tmp_path, data, *options, "run.name=plain")
    assert gloo(2, run, plain) == [12, 12]
    assert saves(plain) == [12]
    contents = [
        json.loads((c.run.folder / "checkpoints/step-00000012/manifest.json").read_text()) for c in (config, plain)
    ]
    assert contents[0]["tensors"] == contents[1]["tensors"]


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both say when to save"):
        tiny_config(tmp_path, tmp_path, "checkpoint.time_share=0.01")
    with pytest.raises(UserError, match="where they are depends on time"):
        tiny_config(tmp_path, tmp_path, "checkpoint.every_steps=0", "checkpoint.time_share=0.01", "spikes.deviations=8")
