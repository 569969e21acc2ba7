"""kill -9 at random moments, of one rank or of all, half in a save: the run goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from fault_table import times
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from tiny import prepare_tiny, tiny_file

KILLS = times(2, 200)
STEADY = 'kind = "adamw"\nlr = 1e-4'  # under which rounding does not grow; it does, late in a run, under `muon`
started: list[subprocess.Popen[bytes]] = []


def start(config: Path, name: str, *overrides: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    """A launcher and its ranks; what they say is in `<name>.log`."""
    command = [sys.executable, "-m", "headrace", "train", str(config), "--nproc", str(ranks), f"run.name={name}"]
    command += overrides
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (config.parent / f"{name}.log").open("ab") as log:
        started.append(subprocess.Popen(command, stderr=log, env=environment))
    return started[-1]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """A test that fails leaves no run behind: ranks end with their launcher."""
    yield
    for launcher in started:
        launcher.kill()
        launcher.wait()
    started.clear()


def kill(launcher: subprocess.Popen[bytes], generator: random.Random) -> None:
    """kill -9 of one rank, which ends the others; or of the ranks in any order, and of the launcher."""
    ranks = ranks_of(launcher)
    one = ranks and generator.random() < 0.5
    kill_9(launcher, [generator.choice(ranks)] if one else [*ranks, launcher.pid])


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def kill_9(launcher: subprocess.Popen[bytes], victims: list[int]) -> None:
    """kill -9 of the launcher or its ranks; returns when none of them is left."""
    ranks = ranks_of(launcher)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    launcher.wait(60)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.01)


def wait_for_a_moment(process: subprocess.Popen[bytes], folder: Path, generator: random.Random) -> str:
    """Where the run is then: in a save, in a step, or somewhere in its start."""
    chance = generator.random()
    if chance < 0.2:
        until, before = time.monotonic() + generator.uniform(0.0, 6.0), steps_on_record(folder)
        while time.monotonic() < until and steps_on_record(folder) <= before:
            time.sleep(0.01)
        return "start"
    what, steps = ("save", 1) if chance < 0.7 else ("step", generator.randint(1, 12))
    wanted = steps_on_record(folder) + steps
    while process.poll() is None and steps_on_record(folder) < wanted:
        time.sleep(0.005)
    while what == "save" and process.poll() is None and not list((folder / "checkpoints").glob(".tmp-step-*")):
        time.sleep(0.0005)
    time.sleep(generator.uniform(0.0, 0.02))
    return what


def losses(folder: Path) -> list[tuple[int, int, float]]:
    """(step, tokens, loss) of every train record, as written."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["tokens"], r["loss"]) for r in records if r["kind"] == "train"]


def assert_same_bits(folder: Path, expected: Path) -> None:
    """Losses of every step; weights and optimizer state at the end."""
    assert losses(folder) == losses(expected)
    found, wanted = (load_full(latest_checkpoint(run / "checkpoints")) for run in (folder, expected))
    assert wanted.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


@pytest.mark.fault("kill -9 of the launcher alone", "its ranks end too: no process stays behind")
def test_ranks_end_with_their_launcher(tmp_path: Path, data: Path) -> None:
    """Only the launcher is killed; a rank that trained on would hold the run folder for ever."""
    launcher = start(tiny_file(tmp_path, data, steps=99999), "orphan")
    while steps_on_record(tmp_path / "orphan") < 1:
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.fault("SIGTERM, SIGUSR1 to the launcher", "saved and stopped; the next start goes on")
def test_a_signal_to_the_launcher_saves_and_stops(tmp_path: Path, data: Path) -> None:
    """SIGUSR1, as slurm sends ahead of a time limit, and SIGTERM; the next start goes on."""
    config = tiny_file(tmp_path, data, steps=99999, every_steps=0)
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


@pytest.mark.fault(
    "kill -9 of all and the launcher, copies in memory", "the next start goes on from memory; the same bits"
)
def test_a_killed_run_goes_on_from_memory(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """The disk has nothing yet; copies, in a folder of the test's own, outlive all processes and go with the run."""
    config = whole(steps_for(KILLS))
    keys = [
        f"checkpoint.memory_folder={tmp_path}/memory",
        "checkpoint.memory_every_steps=3",
        "checkpoint.every_steps=0",
    ]
    launcher, folder = start(config, "from-memory", *keys), config.parent / "from-memory"
    while steps_on_record(folder) < 20:
        assert launcher.poll() is None
        time.sleep(0.002)
    kill_9(launcher, [*ranks_of(launcher), launcher.pid])
    assert list(folder.glob("checkpoints/step-*")) == []
    assert start(config, "from-memory", *keys).wait(240) == 0, folder.with_suffix(".log").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [record for record in records if record["kind"] == "memory_resume"]
    assert resumed["from_peers"] == []
    assert 12 <= resumed["step"] < steps_for(KILLS)
    assert_same_bits(folder, config.parent / "whole")
    assert list((tmp_path / "memory").iterdir()) == []


def steps_on_record(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def steps_for(kills: int) -> int:
    """Of a run that is killed so often, and is not done before."""
    return 40 + 15 * kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """By number of steps: the configuration of runs of so many, in whose folder `whole` is one that nobody killed."""

    @cache
    def config_of(steps: int) -> Path:
        folder = tmp_path_factory.mktemp(f"whole-{steps}")
        config = tiny_file(folder, prepare_tiny(folder), steps=steps, every_steps=5)
        config.write_text(config.read_text().replace('kind = "muon"', STEADY))
        assert start(config, "whole").wait(240 + steps) == 0, (folder / "whole.log").read_text()
        assert [step for step, _, _ in losses(folder / "whole")] == list(range(1, steps + 1))
        return config

    return config_of


def kill_often(config: Path, name: str, kills: int, sizes: list[int], record: Callable[[str, int], None]) -> Path:
    """The folder of a finished run killed so often, each start on as many ranks as `sizes` says in turn."""
    generator = random.Random(0)
    folder, moments = config.parent / name, []
    for number in range(kills):
        process = start(config, name, ranks=sizes[number % len(sizes)])
        moments.append(wait_for_a_moment(process, folder, generator))
        assert process.poll() is None, "the run ended before it was killed"
        kill(process, generator)
    assert start(config, name).wait(300 + steps_for(kills)) == 0, folder.with_suffix(".log").read_text()
    print(f"killed {kills} times: {dict(Counter(moments))}")
    record("tried", kills)
    return folder


@pytest.mark.fault("kill -9 of a rank, or of all and the launcher", "the next start goes on; the same bits")
@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_runs_end_as_the_uninterrupted_one(whole: Callable[[int], Path], record_property: Callable) -> None:
    config = whole(steps_for(KILLS))
    assert_same_bits(kill_often(config, "killed", KILLS, [2], record_property), config.parent / "whole")


@pytest.mark.fault(
    "kill -9, the next start on 1, 2 or 4 ranks", "goes on; no step lost or repeated, the same data; equal to rounding"
)
@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_runs_go_on_on_other_numbers_of_ranks(whole: Callable[[int], Path], record_property: Callable) -> None:
    config = whole(steps_for(KILLS))
    killed = losses(kill_often(config, "other-ranks", KILLS, [4, 1, 2], record_property))
    never = losses(config.parent / "whole")
    assert [row[:2] for row in killed] == [row[:2] for row in never]
    assert [row[2] for row in killed] == pytest.approx([row[2] for row in never], rel=1e-5)
