"""kill -9 of all ranks at random moments: the run goes on as if nothing had happened.

`HEADRACE_KILLS` sets how often (default 3).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from tiny import CONFIG, prepare_tiny

KILLS = int(os.environ.get("HEADRACE_KILLS", "3"))
STEPS = 60 + 40 * KILLS


def start(config: Path, name: str) -> subprocess.Popen[bytes]:
    """A launcher and its two ranks."""
    command = [sys.executable, "-m", "headrace", "train", str(config), "--nproc", "2", f"run.name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """kill -9 of the ranks in any order, and of the launcher."""
    ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    for pid in [*ranks, launcher.pid]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.01)


def losses(folder: Path) -> list[tuple[int, int, float]]:
    """(step, tokens, loss) of every train record, as written."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["tokens"], r["loss"]) for r in records if r["kind"] == "train"]


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """Only the launcher is killed; a rank that trained on would hold the run folder for ever."""
    data = prepare_tiny(tmp_path)
    config = tmp_path / "tiny.toml"
    config.write_text(
        CONFIG.replace("[data]", f'root = "{tmp_path}"\n[data]\nfolder = "{data}"').replace("= 6", "= 99999")
    )
    launcher = start(config, "orphan")
    while steps_on_record(tmp_path / "orphan") < 1:
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_to_the_launcher_saves_and_stops(tmp_path: Path) -> None:
    """SIGUSR1, as slurm sends ahead of a time limit, and SIGTERM; the next start goes on."""
    data = prepare_tiny(tmp_path)
    config = tmp_path / "tiny.toml"
    text = CONFIG.replace("[data]", f'root = "{tmp_path}"\n[data]\nfolder = "{data}"')
    config.write_text(text.replace("steps = 6", "steps = 99999").replace("every_steps = 2", "every_steps = 0"))
    before = 0
    for number, status in ((signal.SIGUSR1, 0), (signal.SIGTERM, 128 + signal.SIGTERM)):
        launcher = start(config, "asked")
        while steps_on_record(tmp_path / "asked") < before + 3:
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(number)
        assert launcher.wait(60) == status
        marker = json.loads((tmp_path / "asked" / "STOPPED").read_text())
        assert marker["reason"] == number.name
        assert latest_checkpoint(tmp_path / "asked" / "checkpoints").name == f"step-{marker['step']:08}"
        assert marker["step"] >= before + 3
        before = marker["step"]
    assert [step for step, _, _ in losses(tmp_path / "asked")] == list(range(1, before + 1))


def steps_on_record(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


@pytest.mark.timeout(300 + 20 * KILLS)
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    data = prepare_tiny(tmp_path)
    config = tmp_path / "tiny.toml"
    text = CONFIG.replace("[data]", f'root = "{tmp_path}"\n[data]\nfolder = "{data}"')
    config.write_text(text.replace("steps = 6", f"steps = {STEPS}").replace("every_steps = 2", "every_steps = 5"))
    whole = start(config, "whole")
    assert whole.wait(300) == 0

    generator = random.Random(0)
    moments = []
    for _ in range(KILLS):
        process = start(config, "killed")
        if generator.random() < 0.7:  # in training, or in one of its saves
            before = steps_on_record(tmp_path / "killed")
            while process.poll() is None and steps_on_record(tmp_path / "killed") <= before:
                time.sleep(0.02)
            time.sleep(generator.uniform(0.0, 0.7))
        else:  # at any moment of the start
            time.sleep(generator.uniform(0.0, 6.0))
        assert process.poll() is None, "the run ended before it was killed"
        kill_all(process)
        moments.append(steps_on_record(tmp_path / "killed"))
    assert start(config, "killed").wait(300) == 0

    print(f"killed {len(moments)} times, after steps {moments}")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [step for step, _, _ in losses(tmp_path / "whole")] == list(range(1, STEPS + 1))
    expected = load_full(latest_checkpoint(tmp_path / "whole" / "checkpoints"))
    again = load_full(latest_checkpoint(tmp_path / "killed" / "checkpoints"))
    assert expected.keys() == again.keys()
    assert all(again[name].equal(tensor) for name, tensor in expected.items())
