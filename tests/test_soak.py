"""The logic of benchmarks/soak.py, on a stand-in for a run that needs no torch: done to, started again, judged."""

import importlib
import itertools
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from headrace.pretrain.checkpoint import save_checkpoint
from headrace.pretrain.goodput import Goodput

ROOT = Path(__file__).resolve().parents[1]
# A launcher with two ranks; rank 0 takes a step every 10 ms and makes a checkpoint every 20, and goes on from there.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
folder, steps, status = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if len(sys.argv) == 4:
    signal.signal(signal.SIGTERM, lambda *_: [(rank.terminate(), rank.wait()) for rank in ranks] and sys.exit(143))
    ranks = [subprocess.Popen([sys.executable, *sys.argv, str(rank)]) for rank in range(2)]
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    found = ranks[0].poll()
    for rank in ranks:
        rank.kill()
        rank.wait()
    sys.exit(1 if found is None or found < 0 else found)
launcher, checkpoints = os.getppid(), folder / "checkpoints"
checkpoints.mkdir(parents=True, exist_ok=True)
step = max([int(path.name[5:]) for path in checkpoints.glob("step-*")], default=0)
while step < steps and os.getppid() == launcher:
    time.sleep(0.01)
    if sys.argv[4] == "1":
        continue
    step += 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step}) + chr(10))
    if step % 20 == 0:
        hidden = checkpoints / f".tmp-step-{step:08}"
        hidden.mkdir(exist_ok=True)
        for name in ("manifest.json", "rank-00000.safetensors"):
            (hidden / name).write_text("x" * 99)
        time.sleep(0.02)
        path = checkpoints / f"step-{step:08}"
        if not path.exists():
            hidden.rename(path)
    if (folder / "STOP").exists():
        (folder / "STOP").unlink()
        break
sys.exit(status)
"""


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    faults = importlib.import_module("soak_faults")
    monkeypatch.setattr(faults, "QUEUE_S", 0.05)
    return importlib.import_module("soak")


def stand_in(soak: ModuleType, folder: Path, steps: int, status: int = 0):  # type: ignore[no-untyped-def]
    script = folder / "stand_in.py"
    script.write_text(STAND_IN)
    command = [sys.executable, str(script), str(folder / "run"), str(steps), str(status)]
    return soak.SoakRun(command, folder / "run", steps, folder)


def test_faults_are_drawn_from_the_seed(soak: ModuleType) -> None:
    faults = soak.draw_faults(3, 600.0, 60.0, list(soak.FAULTS))
    assert faults == soak.draw_faults(3, 600.0, 60.0, list(soak.FAULTS))
    assert faults != soak.draw_faults(4, 600.0, 60.0, list(soak.FAULTS))
    assert 500 < len(faults) < 700
    assert all(fault.at_s < 36_000 for fault in faults)
    waits = [b.at_s - a.at_s for a, b in itertools.pairwise(faults)]
    assert min(waits) < 5 < 150 < max(waits)  # exponential, not even
    counts = Counter(fault.kind for fault in faults)
    assert counts.keys() == soak.FAULTS.keys()
    assert max(counts.values()) - min(counts.values()) <= 1


DONE = ["kill_rank", "power_cut", "preemption", "pause", "kill_in_save", "flip", "missing", "STOP", "CHECKPOINT_NOW"]


def test_whatever_is_done_the_loop_starts_it_again(soak: ModuleType, tmp_path: Path) -> None:
    run = stand_in(soak, tmp_path, 600)
    for number, kind in enumerate(DONE):
        run.wait_for(lambda: run.furthest and not run._pending and run.both_ranks())
        soak.FAULTS[kind][1](run, random.Random(number))
    soak.disturb(run, [soak.Planned(0.0, "kill_rank", 0), soak.Planned(0.1, "STOP", 0)], limit_s=0.05)
    assert (run.furthest, run.interventions, run.is_over) == (600, [], True)
    records = soak.read_lines(tmp_path / "faults.jsonl")
    done = [*DONE, "kill_rank"]
    assert [record["kind"] for record in records if "step" in record] == done
    followed = [record["fault"] for record in records if record["kind"] == "new step"]
    assert sorted(followed) == list(range(1, len(done) + 1))
    assert run.launches == 1 + len(done) - 2  # all but a pause and CHECKPOINT_NOW end it
    assert run.launcher is None


def test_a_mistake_of_the_users_is_an_intervention(soak: ModuleType, tmp_path: Path) -> None:
    run = stand_in(soak, tmp_path, 1, status=2)
    soak.disturb(run, [], 60.0)
    assert len(run.interventions) == 3
    assert run.is_over


def test_a_run_that_comes_no_further_is_an_intervention(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stand_in(soak, tmp_path, 10**6)
    run.wait_for(lambda: run.furthest)
    monkeypatch.setattr(sys.modules["soak_faults"], "STUCK_S", 0.5)
    for pid in run.both_ranks():
        sys.modules["soak_faults"].send(pid, signal.SIGSTOP)
    until = time.monotonic() + 20
    while not run.is_over and time.monotonic() < until:
        run.tend()
    run.close()
    assert run.interventions == ["no new step for 0 s"]


def test_the_last_whole_checkpoint_is_left(soak: ModuleType, tmp_path: Path) -> None:
    """Damage that nothing could survive shows nothing."""
    faults = sys.modules["soak_faults"]
    run = stand_in(soak, tmp_path, 10)
    assert faults.newest_of_two(run) is None
    first, second, third = (run.checkpoints / f"step-{step:08}" for step in (20, 40, 60))
    first.mkdir(parents=True)
    assert faults.newest_of_two(run) is None
    second.mkdir()
    assert faults.newest_of_two(run) == second
    run.damaged.append(second.name)
    assert faults.newest_of_two(run) is None
    third.mkdir()
    assert faults.newest_of_two(run) == third


def test_files_are_harmed(tmp_path: Path) -> None:
    faults = importlib.import_module("soak_faults")
    file = tmp_path / "piece"
    for number in range(50):
        file.write_bytes(bytes(range(200)))
        faults.flip_byte(file, random.Random(number))
        assert sum(a != b for a, b in zip(file.read_bytes(), range(200), strict=True)) == 1
        faults.cut_file(file, random.Random(number))
        assert len(file.read_bytes()) < 200


def finished(folder: Path, loss: float, value: float, tokens: int = 8) -> Path:
    folder.mkdir()
    record = {"kind": "train", "step": 1, "tokens": tokens, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "skipped": 0}
    other = {"kind": "save", "step": 1, "blocked_s": loss}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(other) + "\n")
    tensors = {"model.w": torch.full((3,), value)}
    save_checkpoint(folder / "checkpoints", 1, tensors, extra={"progress": {"step": 1, "tokens": tokens}})
    return folder


def test_differences_are_found(soak: ModuleType, tmp_path: Path) -> None:
    first = finished(tmp_path / "a", 2.0, 1.0)
    assert soak.differences(first, finished(tmp_path / "b", 2.0, 1.0)) == []
    assert soak.differences(first, finished(tmp_path / "c", 2.0000001, 1.0)) == ["train records differ from step 1"]
    assert soak.differences(first, finished(tmp_path / "d", 2.0, 1.0000001)) == ["model.w differs"]
    differs = soak.differences(first, finished(tmp_path / "e", 2.0, 1.0, tokens=9))
    assert differs == ["train records differ from step 1", "counters differ"]


GOODPUT = Goodput(
    starts=5, lost_steps=120, wall_s=600.0, training_s=480.0, lost_s=30.0, skipped_s=0.0, startup_s=60.0,
    evaluation_s=6.0, saving_s=6.0, closing_s=6.0, waiting_s=12.0,
)  # fmt: skip


def test_the_table(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"kind": "hang", "fault": 1, "step": 7},
        {"kind": "new step", "fault": 1, "seconds": 40.0},
        {"kind": "hang", "fault": 2, "step": 9},
        {"kind": "STOP", "fault": 3, "step": 11},
        {"kind": "new step", "fault": 3, "seconds": 10.0},
        {"kind": "new step", "fault": 2, "seconds": 20.0},
    ]
    outcome = soak.Outcome(
        minutes=10.0, every_s=60.0, seed=0, steps=9000, step_s=0.05, save_every=100, launches=3, goodput=GOODPUT,
        interventions=[], differences=[], set_aside=1, hangs_named=2,
    )  # fmt: skip
    text = soak.format_outcome(outcome, records)
    assert "| SIGSTOP of a rank, for ever | 2 | 30.0 | 40.0 |\n| the file STOP | 1 | 10.0 | 10.0 |" in text
    assert "| all | 3 | 20.0 | 40.0 |" in text
    assert "| goodput, of 10.0 minutes | 80.0% |" in text
    assert "| every loss, weights and optimizer state at the end | the same bits |" in text
    assert "skipped updates" not in text
    assert outcome.is_good

    monkeypatch.setattr(soak, "PAGE", tmp_path / "faults.md")
    (tmp_path / "faults.md").write_text("# Faults\n\nothers\n")
    for table in ("old\n", text):
        soak.write(table)
    page = (tmp_path / "faults.md").read_text()
    assert page.startswith("# Faults\n\nothers\n\n## Two hours, a fault a minute\n\n")
    assert page.count(text) == 1
    assert "old" not in page
