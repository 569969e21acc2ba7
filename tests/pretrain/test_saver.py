"""Saves of a run: beside training with the same bytes, tried again where a disk fails, and one at a time."""

import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from headrace.errors import UserError
from headrace.pretrain import saver
from headrace.pretrain.checkpoint import HostCopy, list_checkpoints, load_full, storage
from headrace.pretrain.checkpoint import host_copy as host_copy_module
from headrace.pretrain.config import Config
from headrace.pretrain.resume import Progress
from headrace.pretrain.saver import Job, Saver
from tiny import records, tiny_config, train_or_refusal, train_tiny


def saved_steps(config: Config) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(config.run.folder / "checkpoints")]


def content(config: Config) -> dict[str, bytes]:
    folder = config.run.folder / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_held_back(config: Config) -> int | str:
    """Nothing is written before the next save is due, which then has to wait."""
    release, waited, save, write = threading.Semaphore(0), 0, Saver.save, Saver._write

    def release_and_save(self: Saver, progress: Progress, must: bool) -> None:
        nonlocal waited
        waited += self._thread is not None and self._thread.is_alive()
        release.release()
        save(self, progress, must)

    def hold(self: Saver, job: Job, copy: HostCopy) -> None:
        if job.snapshot.step == 2:
            release.acquire()  # of the save that begins this one
        assert release.acquire(timeout=60)
        write(self, job, copy)

    with mock.patch.object(Saver, "save", release_and_save), mock.patch.object(Saver, "_write", hold):
        result = train_or_refusal(config)
    assert waited == 2
    return result


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_has_no_more_memory_than_its_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """The least of all above it counts; file cache that can go is no use of it."""
    own, most, used, root = {
        1: ("5:cpu,memory:/slurm/job\n3:pids:/x\n", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory"),
        2: ("0::/slurm/job\n", "memory.max", "memory.current", ""),
    }[version]
    for name, limit in (("slurm", "3000"), ("slurm/job", "max" if version == 2 else str(2**63))):
        folder = tmp_path / root / name
        folder.mkdir(parents=True)
        (folder / most).write_text(limit)
        (folder / used).write_text("1500")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 400\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(host_copy_module, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host_copy_module, "CGROUPS", tmp_path)
    assert host_copy_module.available_memory() == 1900


def patience(config: Config) -> set[timedelta | None]:
    """How long each save of a run lets a rank's disk take before the others give up."""
    found = set()

    def look(*_: Any, group: dist.ProcessGroup | None, **__: Any) -> None:
        found.add(None if group is None else group._get_backend(torch.device("cpu")).options._timeout)

    with mock.patch.object(saver, "save_checkpoint", look):
        train_tiny(config)
    return found


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_slow_disk_has_hours(gloo: Callable, tmp_path: Path, data: Path, asynchronous: str) -> None:
    """Longer than collectives of training: the last save, which training waits for, too."""
    config = tiny_config(tmp_path, data, f"checkpoint.asynchronous={asynchronous}")
    assert gloo(2, patience, config) == [{timedelta(hours=4)}] * 2


EIGHT = ("optimizer.kind=adamw", "optimizer.state_bits=8", "optimizer.block_size=16", "optimizer.min_8bit_size=0")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(1, ("train.average_decay=0.9",)), (2, ("parallel.tp=2", *EIGHT))],
    ids=["1", "2"],
)
def test_the_same_bytes_as_a_blocking_save(
    gloo: Callable, tmp_path: Path, data: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    """Also when nothing is written before later steps have changed every tensor."""
    found = {}
    for name, function, asynchronous in (("blocking", train_or_refusal, "false"), ("late", run_held_back, "true")):
        changes = (f"run.name={name}", f"checkpoint.asynchronous={asynchronous}", *overrides)
        config = tiny_config(tmp_path, data, *changes)
        assert gloo(ranks, function, config) == [6] * ranks
        found[name] = content(config), [record["loss"] for record in records(config, "train")]
        saves = records(config, "save")
        assert [save["step"] for save in saves] == [2, 4, 6]
        beside = [save["background_s"] > 0 for save in saves]
        assert beside == ([False] * 3 if name == "blocking" else [True, True, False])
        assert all(save["blocked_s"] >= save["waited_s"] >= 0 and save["attempts"] == 1 for save in saves)
    assert len(found["blocking"][0]) == 3 * (ranks + 1)
    assert found["late"] == found["blocking"]


@contextmanager
def failing_disk(rank: int, *fails: bool) -> Iterator[None]:
    """Writing on `rank` fails in the tries marked so, counted over the run; the last mark holds for all later ones."""
    tries, write = 0, storage.write_pieces

    def maybe(path: Path, sources: Any) -> Any:
        nonlocal tries
        tries += 1
        if dist.get_rank() == rank and fails[min(tries, len(fails)) - 1]:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, sources)

    with mock.patch.object(storage, "write_pieces", maybe), mock.patch.object(saver, "FIRST_WAIT_S", 0.01):
        yield


def run_failing(config: Config, rank: int, *fails: bool) -> int | str:
    with failing_disk(rank, *fails):
        return train_or_refusal(config)


@pytest.mark.fault("a disk that fails twice in a save", "tried again; saved at the third try")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_is_tried_again(gloo: Callable, tmp_path: Path, data: Path, asynchronous: str) -> None:
    config = tiny_config(tmp_path, data, f"checkpoint.asynchronous={asynchronous}")
    assert gloo(2, run_failing, config, 1, True, True, False) == [6, 6]
    assert saved_steps(config) == [2, 4, 6]
    assert [save["attempts"] for save in records(config, "save")] == [3, 1, 1]
    failures = records(config, "save_failed")
    assert [(f["step"], f["attempt"], f["wait_s"]) for f in failures] == [(2, 1, 0.01), (2, 2, 0.02)]
    assert all("No space left on device (rank 1" in failure["reason"] for failure in failures)
    assert not list((config.run.folder / "checkpoints").glob(".tmp*"))


@pytest.mark.fault("a disk that fails in all tries of a save", "said and recorded; the run goes on and saves later")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_periodic_save_may_fail(gloo: Callable, tmp_path: Path, data: Path, asynchronous: str) -> None:
    config = tiny_config(
        tmp_path, data, f"checkpoint.asynchronous={asynchronous}", "checkpoint.retries=1", "checkpoint.failures_limit=2"
    )
    assert gloo(2, run_failing, config, 0, False, True, True, False) == [6, 6]
    assert saved_steps(config) == [2, 6]
    assert [(f["step"], f["attempt"]) for f in records(config, "save_failed")] == [(4, 1), (4, 2)]
    assert [save["step"] for save in records(config, "save")] == [2, 6]


@pytest.mark.fault(
    "a disk that does not recover", "the run ends in one line; the last checkpoint is whole, and the next start goes on"
)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_too_many_failures_end_the_run(gloo: Callable, tmp_path: Path, data: Path, asynchronous: str) -> None:
    names = (f"checkpoint.asynchronous={asynchronous}", "checkpoint.retries=0", "checkpoint.failures_limit=2")
    config = tiny_config(tmp_path, data, "checkpoint.every_steps=1", *names)
    messages = gloo(2, run_failing, config, 1, False, True)
    assert len(set(messages)) == 1
    assert "step-00000003 was not saved: No space left on device (rank 1" in messages[0]
    assert f"the last checkpoint is {config.run.folder}/checkpoints/step-00000001 (2 saves in a row" in messages[0]
    assert saved_steps(config) == [1]
    assert load_full(config.run.folder / "checkpoints" / "step-00000001")
    assert gloo(2, train_or_refusal, config) == [6, 6]


def test_what_cannot_be_removed_costs_one_save(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Something has the name of the hidden folder that a save at 2 would write into."""
    config = tiny_config(tmp_path, data, "checkpoint.retries=0")
    (config.run.folder / "checkpoints").mkdir(parents=True)
    (config.run.folder / "checkpoints" / ".tmp-step-00000002").touch()
    assert gloo(2, train_or_refusal, config) == [6, 6]
    assert saved_steps(config) == [4, 6]
    (failure,) = records(config, "save_failed")
    assert "step-00000002 was not saved: File exists" in failure["reason"]


def test_the_last_save_must_not_fail(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "checkpoint.retries=1")
    for message in gloo(2, run_failing, config, 0, False, False, True):
        assert "step-00000006 was not saved: No space left on device" in message
    assert saved_steps(config) == [2, 4]
    assert [f["wait_s"] for f in records(config, "save_failed")] == [0.01, None]


def test_a_save_that_is_asked_for_must_not_fail(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "checkpoint.retries=0", "checkpoint.every_steps=0")
    config.run.folder.mkdir()
    (config.run.folder / "CHECKPOINT_NOW").touch()
    for message in gloo(2, run_failing, config, 0, True):
        assert "step-00000002 was not saved" in message


def run_and_watch(config: Config) -> list[int]:
    """How many steps after the thread has ended, which is before the first, the failed save at 2 is reported."""
    steps, reported, poll, report = 0, [], Saver.poll, Saver._report

    def late_poll(self: Saver) -> None:
        nonlocal steps
        if self._job is not None and self._job.snapshot.step == 2:
            assert self._thread is not None
            self._thread.join()
            steps += 1
        poll(self)

    def note(self: Saver, job: Job, must: bool) -> None:
        if job.snapshot.step == 2:
            assert isinstance(job.error, saver.CheckpointWriteError)
            reported.append(steps)
        report(self, job, must)

    with mock.patch.object(Saver, "poll", late_poll), mock.patch.object(Saver, "_report", note):
        assert run_failing(config, 0, True, False) == 6
    return reported


@pytest.mark.parametrize(("ranks", "steps"), [(1, 1), (3, 2)])
def test_all_ranks_know_of_a_failure_in_the_step_after(
    gloo: Callable, tmp_path: Path, data: Path, ranks: int, steps: int
) -> None:
    """The poll of the step in which the thread ended, and with several ranks that of the next: the same on all."""
    names = ("train.batch_rows=6", "checkpoint.retries=0", "checkpoint.every_steps=2")
    assert gloo(ranks, run_and_watch, tiny_config(tmp_path, data, *names)) == [[steps]] * ranks


def run_with_a_defect(config: Config) -> str:
    """What a run ends with on this rank when the code that saves is wrong."""
    wrong = mock.Mock(side_effect=RuntimeError("a defect"))
    with mock.patch.object(storage, "write_pieces", wrong), pytest.raises(RuntimeError) as met:
        train_tiny(config)
    return str(met.value)


def test_a_defect_beside_training_is_not_swallowed(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    assert gloo(2, run_with_a_defect, config) == ["a defect"] * 2
    assert saved_steps(config) == []


def run_stopped_by_an_error(config: Config) -> int | str:
    """An error that all ranks meet just after the save at 2 has begun."""
    from headrace.pretrain import trainer

    check = trainer.check_finite

    def stop(config: Config, progress: Any, skipped: int) -> None:
        check(config, progress, skipped)
        if progress.step == 3:
            raise UserError("enough", everywhere=True)

    with mock.patch.object(trainer, "check_finite", stop):
        return train_or_refusal(config)


def test_an_error_of_all_lets_a_save_under_way_end(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    assert gloo(2, run_stopped_by_an_error, config) == ["enough"] * 2
    assert saved_steps(config) == [2]
    assert [save["step"] for save in records(config, "save")] == [2]


KILLED_BESIDE_TRAINING = """
import os, pathlib, signal, sys, threading
import torch, torch.distributed as dist
from headrace.parallel.mesh import World
from headrace.pretrain.checkpoint import storage
from headrace.pretrain.config import load_config
from headrace.pretrain.trainer import train

publish = storage.publish

def killing(temporary, path):
    if path.name == "step-00000004":
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)

storage.publish = killing
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
train(load_config(pathlib.Path(sys.argv[1])), World(0, 1, torch.device("cpu")))
"""


@pytest.mark.fault(
    "kill -9 in a save beside training, just before its rename", "the earlier checkpoint; the same bits at the end"
)
def test_kill_9_beside_training(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """After everything is written and before the rename: the checkpoint before it is there, and the run goes on."""
    config = tiny_config(tmp_path, data, "train.steps=8")
    (tmp_path / "whole.toml").write_text(config.to_toml())
    command = [sys.executable, "-c", KILLED_BESIDE_TRAINING, str(tmp_path / "whole.toml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = config.run.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".tmp-step-00000004", "step-00000002"]
    assert gloo(1, train_or_refusal, config) == [8]
    whole = tiny_config(tmp_path, data, "train.steps=8", "run.name=whole")
    assert gloo(1, train_or_refusal, whole) == [8]
    name = "step-00000008/rank-00000.safetensors"
    assert content(config)[name] == content(whole)[name]
    assert not list(checkpoints.glob(".tmp*"))


def run_with_little_memory(config: Config, file: Path) -> int | str:
    with mock.patch.object(host_copy_module, "MEMORY", str(file)):
        return train_or_refusal(config)


def test_without_memory_for_the_copy(gloo: Callable, tmp_path: Path, data: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9999999 kB\nMemAvailable:   4 kB\n")
    for message in gloo(2, run_with_little_memory, tiny_config(tmp_path, data), tmp_path / "meminfo"):
        assert "set checkpoint.asynchronous=false" in message
    config = tiny_config(tmp_path, data, "checkpoint.asynchronous=false")
    assert gloo(2, run_with_little_memory, config, tmp_path / "meminfo") == [6, 6]


def test_a_copy_is_of_its_moment_and_used_again() -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3).t(),
        "b": torch.tensor(2),
        "c": torch.empty(0, 3),
        "d": torch.ones(3).half(),
    }
    copy = HostCopy(tensors)
    places = {name: tensor.data_ptr() for name, tensor in copy.tensors.items()}
    assert copy.num_bytes == 24 + 8 + 6
    for number in (1, 2):
        tensors["a"].fill_(number)
        copy.take()
        tensors["a"].fill_(99)
        copy.wait()
        assert torch.equal(copy.tensors["a"], torch.full((3, 2), float(number)))
    assert copy.tensors["a"].is_contiguous()
    assert {name: tensor.data_ptr() for name, tensor in copy.tensors.items()} == places


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_ahead_of_later_work() -> None:
    tensor = torch.zeros(1 << 24, device="cuda")
    copy = HostCopy({"a": tensor})
    assert copy.tensors["a"].is_pinned()
    for number in range(1, 4):
        tensor.fill_(number)
        copy.take()
        tensor.fill_(99)
        copy.wait()
        assert bool((copy.tensors["a"] == number).all())
