"""Runs whose disk is full, or read-only: they wait for room, or end in one line with their checkpoints whole."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from headrace.errors import UserError
from headrace.pretrain import saver
from headrace.pretrain.checkpoint import list_checkpoints, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.trainer import train
from tiny import records, this_world, tiny_config

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB where the checkpoints of a run go."""
    folder = tmp_path / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def make_room(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


def make_writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def run(config: Config, remedy: Callable[[Path], None] | None, disk: Path) -> int | str:
    """The step a run ends at, or its error; `remedy` comes while it waits for its next try to save."""

    def wait(seconds: float) -> None:
        if remedy is not None and dist.get_rank() == 0:
            remedy(disk)
        time.sleep(min(seconds, 0.2))

    world = this_world()
    with mock.patch.object(saver, "time", SimpleNamespace(sleep=wait, perf_counter=time.perf_counter)):
        try:
            return train(config, world).step
        except UserError as error:
            return str(error) if error.everywhere else "every rank would print its own"


@pytest.mark.fault(
    "the checkpoints' disk full, or read-only, until a save is tried again (a tmpfs)", "saved then; nothing is lost"
)
@pytest.mark.parametrize(
    ("harm", "remedy", "words"),
    [(fill, make_room, "are free"), (make_read_only, make_writable, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_disk_that_recovers(
    gloo: Callable,
    tmp_path: Path,
    data: Path,
    disk: Path,
    harm: Callable[[Path], None],
    remedy: Callable[[Path], None],
    words: str,
) -> None:
    config = tiny_config(tmp_path, data)
    harm(disk)
    assert gloo(2, run, config, remedy, disk) == [6, 6]
    assert [path.name for path in list_checkpoints(disk)] == [f"step-{step:08}" for step in (2, 4, 6)]
    failures = records(config, "save_failed")
    assert failures
    assert {failure["step"] for failure in failures} == {2}
    assert all(words in failure["reason"] for failure in failures)
    assert not list(disk.glob(".tmp*"))


@pytest.mark.fault(
    "the checkpoints' disk full, or read-only, to the end (a tmpfs)",
    "the run ends in one line; the checkpoint before is whole, and the next start goes on",
)
@pytest.mark.parametrize(("harm", "remedy"), [(fill, make_room), (make_read_only, make_writable)], ids=["full", "ro"])
def test_a_disk_that_does_not(
    gloo: Callable,
    tmp_path: Path,
    data: Path,
    disk: Path,
    harm: Callable[[Path], None],
    remedy: Callable[[Path], None],
) -> None:
    assert gloo(2, run, tiny_config(tmp_path, data, "train.steps=2"), None, disk) == [2, 2]
    config = tiny_config(tmp_path, data, "checkpoint.retries=1")
    harm(disk)
    for message in gloo(2, run, config, None, disk):
        assert "was not saved: " in message
        assert f"the last checkpoint is {disk}/step-00000002" in message
        assert "\n" not in message
    assert load_full(disk / "step-00000002")
    remedy(disk)
    assert gloo(2, run, config, None, disk) == [6, 6]
    assert not list(disk.glob(".tmp*"))
