"""TensorBoard: the scalars of a run that was stopped and went on, each step once; and what is said without it."""

import builtins
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.pretrain.tensorboard import TensorBoard
from tiny import tiny_config, train_tiny


def test_every_step_is_there_once(gloo: Callable, tmp_path: Path, data: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_config(tmp_path, data, "log.tensorboard=true", "checkpoint.every_steps=2")
    gloo(1, train_tiny, config, 5)
    (config.run.folder / "checkpoints" / "step-00000005").rename(tmp_path / "taken")
    gloo(1, train_tiny, config, None)
    events = accumulator.EventAccumulator(str(config.run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("start/start")] == [1, 2]


def test_without_the_package_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r'pip install "headrace\[tensorboard\]"'):
        TensorBoard(tmp_path, 0)
