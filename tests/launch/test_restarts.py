"""A run that crashes is started again from its newest checkpoint, and ends as if it had not crashed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from headrace.launch import local
from headrace.launch.cli import main
from headrace.launch.local import Ending, run_again_and_again
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from tiny import tiny_file

HEADRACE = [sys.executable, "-m", "headrace"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]


def start(folder: Path, data: Path, name: str, before: list[str], after: list[str]) -> subprocess.Popen[str]:
    """A run whose command begins and ends so."""
    config = tiny_file(folder, data)
    overrides = ["train.steps=40", "checkpoint.every_steps=5", f"run.name={name}"]
    command = [*before, str(config), *overrides, *after]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def kill_a_rank(launcher: subprocess.Popen[str], folder: Path, rank: int = 1, later_s: float = 0.0) -> None:
    """kill -9, so long after the first checkpoint."""
    while latest_checkpoint(folder / "checkpoints") is None:
        assert launcher.poll() is None
        time.sleep(0.01)
    time.sleep(later_s)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[rank]), signal.SIGKILL)


@pytest.mark.fault("kill -9 of a rank, under `--restarts` and `torchrun --max-restarts`", "goes on; the same weights")
def test_kill_9_of_a_rank_does_not_end_the_run(tmp_path: Path, data: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    """Torchrun keeps one store over all starts, with what the killed one left in it."""
    whole = start(tmp_path, data, "whole", [*HEADRACE, "train"], ["--nproc", "2", "--restarts", "2"])
    launcher = start(tmp_path, data, "killed", [*HEADRACE, "launch"], ["--nproc", "2", "--crash-limit", "2"])
    kill_a_rank(launcher, tmp_path / "killed")
    said, _ = (process.communicate(timeout=200)[1] for process in (launcher, whole))
    assert said.count("headrace: started again from the newest checkpoint\n") == 1
    torchrun = start(tmp_path, data, "torchrun", [*TORCHRUN, "-m", "headrace", "train"], [])
    kill_a_rank(torchrun, tmp_path / "torchrun")
    said = torchrun.communicate(timeout=200)[1]
    assert [process.returncode for process in (whole, launcher, torchrun)] == [0, 0, 0], said
    expected = load_full(latest_checkpoint(tmp_path / "whole" / "checkpoints"))
    for name in ("killed", "torchrun"):
        found = load_full(latest_checkpoint(tmp_path / name / "checkpoints"))
        assert found.keys() == expected.keys()
        assert all(found[key].equal(tensor) for key, tensor in expected.items())
    record_property("tried", 2)


# Read by every Python that starts: rank 1 is killed before it has done anything.
KILLED_AT_ONCE = """
import os, signal
if os.environ.get("RANK") == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def crash_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLED_AT_ONCE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.mark.fault("a rank that is killed in every start, under `--restarts 2`", "given up after the second in vain")
@pytest.mark.usefixtures("crash_loop")
def test_a_crash_loop_ends(tmp_path: Path, data: Path) -> None:
    launcher = start(tmp_path, data, "looping", [*HEADRACE, "train"], ["--nproc", "2", "--restarts", "2"])
    said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1
    lines = said.splitlines()
    assert sum("rank 1 was ended by SIGKILL" in line for line in lines) == 2
    assert "headrace: started again from the newest checkpoint; 1 of 2 without a new step" in lines
    assert lines[-1] == "headrace: error: 2 starts without a new step: given up"
    assert "Traceback" not in said


@pytest.mark.usefixtures("crash_loop")
@pytest.mark.parametrize(
    ("how", "statuses"),
    [(signal.SIGTERM, {-15, 143}), (signal.SIGHUP, {-1, 129}), (signal.SIGINT, {130})],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_signal_between_two_starts_ends_it(
    tmp_path: Path, data: Path, how: signal.Signals, statuses: set[int]
) -> None:
    hears_all = ["env", "--default-signal=HUP,INT,TERM", *HEADRACE, "train"]
    launcher = start(tmp_path, data, "looping", hears_all, ["--nproc", "2", "--restarts", "9"])
    assert launcher.stderr is not None
    while "rank 1 was ended by SIGKILL" not in (line := launcher.stderr.readline()):
        assert line
    time.sleep(0.2)  # the pause takes two seconds
    launcher.send_signal(how)
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode in statuses
    assert "Traceback" not in said


def test_one_process_that_came_further_is_started_again(tmp_path: Path, data: Path) -> None:
    after = ["train.steps=99999", "--nproc", "1", "--restarts", "1"]
    launcher = start(tmp_path, data, "single", [*HEADRACE, "train"], after)
    kill_a_rank(launcher, tmp_path / "single", 0, 1.5)  # a beat has told of a step
    assert launcher.stderr is not None
    said = []
    while (line := launcher.stderr.readline()) and not line.startswith("headrace: started again"):
        said.append(line)
    launcher.terminate()
    launcher.communicate(timeout=60)
    assert line == "headrace: started again from the newest checkpoint\n", said
    assert "rank 0 was ended by SIGKILL" in said[-1]
    assert "; last finished step " in said[-1]


def test_a_start_here_takes_no_options_of_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--nodes", "2"], ["--sbatch", "partition=gpu"], ["--stall-minutes", "5"], ["--dry-run"]):
        assert main(["launch", str(tmp_path / "tiny.toml"), "--nproc", "2", *option]) == 2
        assert "--nproc starts the run here" in capsys.readouterr().err


def failure(rank: int, status: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="<N/A>")


def test_what_ranks_meet_because_one_was_killed_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    """A rank whose peer is killed while they meet says so with status 2; nothing would be started again after that."""
    met = ChildFailedError("train", {0: failure(0, 2), 1: failure(1, -signal.SIGKILL)})
    assert local.describe_failure(met, 7) == Ending(1, 7)
    assert "rank 1 was ended by SIGKILL" in capsys.readouterr().err
    for status, other in ((2, 1), (2, -signal.SIGTERM), (1, -signal.SIGTERM), (1, -signal.SIGKILL)):
        own = ChildFailedError("train", {0: failure(0, status), 1: failure(1, other)})
        assert local.describe_failure(own, 7) == Ending(status, 7)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("endings", "status", "starts", "pauses"),
    [
        ([Ending(1, 7), Ending(0)], 0, 2, []),
        ([Ending(2, 7)], 2, 1, []),
        ([Ending(143, 7, asked=True)], 143, 1, []),
        ([Ending(1, 7), Ending(1, 7), Ending(1, 5)], 1, 3, [2.0]),  # two in vain, after one with new steps
        ([Ending(1, None), Ending(1, None)], 1, 2, [2.0]),
        ([Ending(1, 7), Ending(1, 6), Ending(1, 8), Ending(1, None), Ending(0)], 0, 5, [2.0, 2.0]),
    ],
)
def test_when_it_is_given_up(
    endings: list[Ending], status: int, starts: int, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        mock.patch.object(local, "run_processes", side_effect=endings) as run,
        mock.patch.object(local.time, "sleep") as sleep,
    ):
        assert run_again_and_again(["train"], 2, 2) == status
    assert run.call_count == starts
    assert [call.args[0] for call in sleep.call_args_list] == pauses
    assert ("given up" in capsys.readouterr().err) == (status == 1)


def test_starts_in_vain_are_further_and_further_apart() -> None:
    with (
        mock.patch.object(local, "run_processes", return_value=Ending(1)),
        mock.patch.object(local.time, "sleep") as sleep,
    ):
        assert run_again_and_again(["train"], 2, 9) == 1
    assert [call.args[0] for call in sleep.call_args_list] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_a_signal_that_ranks_do_not_hear_yet_is_an_end_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """SIGUSR1 kills a process that still loads its libraries; the launcher was asked, and starts nothing again."""

    def die(*_: str) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise ChildFailedError("train", {0: failure(0, -signal.SIGUSR1), 1: failure(1, -signal.SIGTERM)})

    # Nothing is really passed on: the children of this process are the gloo workers of other tests.
    with mock.patch.object(local, "elastic_launch", return_value=die), mock.patch.object(local, "pass_on") as passed_on:
        assert run_again_and_again(["train"], 2, 2) == 1
    assert passed_on.call_count == 1
    said = capsys.readouterr().err
    assert "rank 0 was ended by SIGUSR1" in said
    assert "started again" not in said


def test_without_restarts_it_is_one_start() -> None:
    with mock.patch.object(local, "run_processes", side_effect=[Ending(1, 7)]):
        assert run_again_and_again(["train"], 2, 0) == 1
