"""A run that crashes is started again from its newest checkpoint, and ends as if it had not crashed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from headrace.launch import local
from headrace.launch.local import Ending, run_again_and_again
from headrace.parallel.mesh import World
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.trainer import train
from tiny import tiny_config


def train_to_end(config: Config) -> int:
    return train(config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))).step


def test_kill_9_of_a_rank_does_not_end_the_run(gloo: Callable, tmp_path: Path, data: Path) -> None:
    overrides = ["train.steps=40", "checkpoint.every_steps=5"]
    whole = tiny_config(tmp_path, data, *overrides, "run.name=whole")  # writes tiny.toml
    overrides += [f"run.root={tmp_path}", f"data.folder={data}", "run.name=killed"]
    command = [sys.executable, "-m", "headrace", "train", str(tmp_path / "tiny.toml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--nproc", "2", "--restarts", "2"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while latest_checkpoint(tmp_path / "killed" / "checkpoints") is None:
        assert launcher.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert gloo(2, train_to_end, whole) == [40, 40]
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 0
    assert said.count("headrace: started again from the newest checkpoint\n") == 1
    found, expected = (load_full(latest_checkpoint(tmp_path / name / "checkpoints")) for name in ("killed", "whole"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("endings", "status", "starts"),
    [
        ([Ending(1, 7), Ending(0)], 0, 2),
        ([Ending(2, 7)], 2, 1),
        ([Ending(143, 7, asked=True)], 143, 1),
        ([Ending(1, 7), Ending(1, 7), Ending(1, 5)], 1, 3),  # two in vain, after one with new steps
        ([Ending(1, None), Ending(1, None)], 1, 2),
        ([Ending(1, 7), Ending(1, 6), Ending(1, 8), Ending(1, None), Ending(0)], 0, 5),
    ],
)
def test_when_it_is_given_up(endings: list[Ending], status: int, starts: int, capsys: pytest.CaptureFixture) -> None:
    with mock.patch.object(local, "run_processes", side_effect=endings) as run:
        assert run_again_and_again(["train"], 2, 2) == status
    assert run.call_count == starts
    assert ("given up" in capsys.readouterr().err) == (status == 1)


def test_without_restarts_it_is_one_start() -> None:
    with mock.patch.object(local, "run_processes", side_effect=[Ending(1, 7)]):
        assert run_again_and_again(["train"], 2, 0) == 1
