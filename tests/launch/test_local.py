"""A run over several processes ends as one: no process stays behind, and one line says why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.launch.local import LAUNCHER, run_processes
from tiny import tiny_file


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Tests may be under nohup themselves.
HEARS_ALL = ("env", "--default-signal=HUP")


def start_training(folder: Path, data: Path, *before: str) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, whose two ranks have begun to train; `before`, as nohup."""
    config = tiny_file(folder, data)
    command = [*before, sys.executable, "-m", "headrace", "train", str(config), "--nproc", "2", "train.steps=99999"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    metrics = folder / "tiny" / "metrics.jsonl"
    while not metrics.exists() or '"train"' not in metrics.read_text():
        assert launcher.poll() is None
        time.sleep(0.05)
    return launcher


@pytest.mark.parametrize(
    ("whom", "how", "status", "line"),
    [
        ("group", signal.SIGINT, 130, "headrace: interrupted"),
        ("launcher", signal.SIGTERM, 143, "headrace: ended by SIGTERM"),
        ("group", signal.SIGHUP, 129, "headrace: ended by SIGHUP"),
        ("rank", signal.SIGKILL, 1, "headrace: error: rank 1 was ended by SIGKILL; the system does that"),
        ("rank", signal.SIGSEGV, 1, "headrace: error: rank 1 was ended by SIGSEGV; "),
    ],
)
def test_a_signal_ends_all(tmp_path: Path, data: Path, whom: str, how: signal.Signals, status: int, line: str) -> None:
    launcher = start_training(tmp_path, data, *HEARS_ALL)
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    if whom == "group":
        os.killpg(launcher.pid, how)
    else:
        os.kill(launcher.pid if whom == "launcher" else ranks[1], how)
    try:
        _, error = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == status
    assert [said.startswith(line) for said in error.splitlines()].count(True) == 1
    assert "Traceback" not in error
    stacks = re.findall(r"^Fatal Python error: (.*)$", error, re.M)
    assert stacks == (["Segmentation fault"] if how == signal.SIGSEGV else [])
    assert bool(re.search(r"^  File .*trainer\.py\", line \d+ in take_steps$", error, re.M)) == bool(stacks)
    assert "torch." not in error or stacks  # its machinery would write pages
    assert ("; last finished step " in error or "; no step was" in error) == (whom == "rank")
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    last = json.loads((tmp_path / "tiny" / "starts.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end"  # rank 0 was let finish


def test_under_nohup_it_outlives_its_terminal(tmp_path: Path, data: Path) -> None:
    launcher = start_training(tmp_path, data, "nohup")
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    os.killpg(launcher.pid, signal.SIGHUP)
    before = len(metrics.read_text().splitlines())
    while len(metrics.read_text().splitlines()) < before + 20:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.terminate()
    launcher.communicate(timeout=60)
    assert launcher.returncode == 143


def test_a_launcher_loads_little() -> None:
    """What spreads and compiles models is as much again as torch itself, at every start."""
    code = "import sys, headrace.launch.local, headrace.pretrain.config; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert {"torch.distributed.tensor", "torch._dynamo", "triton", "sympy"}.isdisjoint(loaded)


def test_a_launcher_does_not_mark_its_own_process() -> None:
    """A later command of the same process would take itself for a rank whose launcher is gone, and end."""
    assert run_processes(["report", "nowhere"], 1).status == 2
    assert LAUNCHER not in os.environ
