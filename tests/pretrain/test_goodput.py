"""Where a run's time went: the parts sum to the whole, through kills, lost steps, skipped updates and waits."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.launch.status import format_status, read_status
from headrace.parallel.mesh import process_began_s
from headrace.pretrain.goodput import PARTS, Goodput, measure_goodput, read_starts, starts_in_vain
from headrace.pretrain.report import read_curves, with_starts, write_report
from headrace.pretrain.run_clock import STARTS, RunClock
from tiny import tiny_config, tiny_file, train_tiny

NOTHING = {"startup": 0.0, "train": 0.0, "eval": 0.0, "save": 0.0, "close": 0.0}


def record(kind: str, start: int, step: int | None = None, step_s: float = 0.0, **more: object) -> dict:
    parts = NOTHING | more.pop("parts", {})
    point = {} if step is None else {"step": step, "tokens": 10 * step, "step_s": step_s, "skipped_s": 0.0}
    return {"kind": kind, "start": start, **point, **more, "parts": parts}


def measure(path: Path, records: list[dict], tail: str = "") -> Goodput:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records) + tail)
    found = measure_goodput(read_starts(path))
    assert found is not None
    return found


def parts(found: Goodput) -> dict[str, float]:
    return {key: value for key, value in asdict(found).items() if key in PARTS}


# Two starts that are killed, one that dies before it trains, one that goes on.
KILLED = [
    record("start", 1, time=1000.0, parts={"startup": 4}),
    record("resume", 1, 0, steps=100, parts={"startup": 10}),
    record("save", 1, 20, 40.0, parts={"startup": 10, "train": 40, "save": 2}),
    # The ten steps since the save, and the half second of another, will be lost; one of four updates was skipped.
    record("beat", 1, 30, 60.0, skipped_s=5.0, parts={"startup": 10, "train": 60.5, "save": 2, "eval": 3}),
    record("start", 2, time=1100.0, parts={"startup": 5}),
    record("start", 3, time=1200.0, parts={"startup": 6}),
    record("resume", 3, 20, steps=100, parts={"startup": 8}),
    record("beat", 3, 24, 8.0, parts={"startup": 8, "train": 9}),
]


def test_every_second_is_somewhere(tmp_path: Path) -> None:
    found = measure(tmp_path / STARTS, KILLED, tail='{"kind": "beat", "start": 3, "st')
    assert found.wall_s == pytest.approx(1217.0 - 1000.0) == pytest.approx(sum(parts(found).values()))
    assert parts(found) == pytest.approx(
        {
            "training_s": 40 + 9,  # the step under way may yet count
            "lost_s": 20.5,
            "skipped_s": 0.0,
            "startup_s": 10 + 5 + 8,
            "evaluation_s": 3,
            "saving_s": 2,
            "closing_s": 0,
            "waiting_s": (1100 - 1075.5) + (1200 - 1105),
        }
    )
    assert (found.starts, found.lost_steps) == (3, 10)
    assert found.fraction == pytest.approx(49 / 217)


@pytest.mark.parametrize(
    "odd",
    [
        {"kind": "start", "start": 4, "parts": {}},
        {"kind": "start", "start": 4, "time": "noon", "parts": {}},
        record("beat", 3, 30, 9.0, parts={"train": "long"}),
        record("beat", 3, 30, 9.0, parts={"train": float("nan")}),
        record("beat", 3, 30, 9.0) | {"parts": [1.0]},
        {"kind": "beat", "start": 3, "step": 30, "parts": NOTHING},
        record("beat", 3, 30, "9"),
        record("beat", 3, 30, 9.0) | {"tokens": 10**400},
        record("beat", 3, 30, 9.0) | {"step": 30.5},
        record("beat", 3, 30, 9.0, steps="all"),
        record("beat", 3, 30, 9.0, status=[]),
    ],
    ids=str,
)
def test_records_of_another_shape_are_passed_over(tmp_path: Path, odd: dict) -> None:
    assert measure(tmp_path / STARTS, [*KILLED, odd]) == measure(tmp_path / STARTS, KILLED)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["x", "3", 10**400, float("nan"), -1]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["train", "eval"]), inner),
    max_leaves=3,
)
FEW = st.integers(0, 4)
PARTS_OF_ONE = st.dictionaries(st.sampled_from(sorted(NOTHING)), FEW | st.floats(0, 9) | ODD)


def odd_records(kinds: tuple[str, ...], *numbers: str) -> st.SearchStrategy[list]:
    """Records most of whose values are what they should be, and other JSON among them."""
    fields = dict.fromkeys(numbers, FEW | FEW | ODD)
    named = {"kind": st.sampled_from(kinds) | ODD, "parts": PARTS_OF_ONE | ODD, "status": st.just("stopped") | ODD}
    return st.lists(st.fixed_dictionaries({}, optional={**fields, **named}) | ODD, max_size=8)


@given(
    odd_records(("start", "beat"), "start", "time", "step", "tokens", "step_s", "skipped_s", "steps"),
    odd_records(("train", "eval"), "step", "tokens", "loss", "tokens_per_s", "bits_per_byte"),
)
def test_any_records_have_a_status(tmp_path_factory: pytest.TempPathFactory, starts: list, metrics: list) -> None:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "config.toml").touch()
    for name, entries in ((STARTS, starts), ("metrics.jsonl", metrics)):
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    starts_in_vain(read_starts(folder / STARTS))
    found = measure_goodput(read_starts(folder / STARTS))
    assert found is None or all(map(math.isfinite, found.to_json().values()))
    status = read_status(folder)
    assert status.goodput == found
    assert format_status([status], as_json=False)
    assert json.loads(format_status([status], as_json=True))["step"] >= 0


def test_skipped_updates_that_stay_are_apart(tmp_path: Path) -> None:
    records = [*KILLED, record("beat", 3, 60, 80.0, skipped_s=4.0, parts={"startup": 8, "train": 80})]
    found = measure(tmp_path / STARTS, records)
    assert (found.skipped_s, found.training_s) == pytest.approx((4.0, 40 + 76))
    assert found.wall_s == pytest.approx(1288.0 - 1000.0) == pytest.approx(sum(parts(found).values()))


def test_an_older_checkpoint_costs_what_all_starts_since_did(tmp_path: Path) -> None:
    """The newest was damaged: the fourth start goes on from step 10, in the midst of what the first had done."""
    records = [
        *KILLED,
        record("start", 4, time=1300.0, parts={"startup": 1}),
        record("resume", 4, 10, steps=100, parts={"startup": 2}),
        record("end", 4, 12, 4.0, status="stopped", parts={"startup": 2, "train": 4, "close": 1}),
    ]
    found = measure(tmp_path / STARTS, records)
    assert found.training_s == pytest.approx(20 + 4)
    assert found.lost_steps == 20 + 4
    assert found.wall_s == pytest.approx(1307.0 - 1000.0) == pytest.approx(sum(parts(found).values()))


def test_a_start_that_finds_all_done_does_not_count(tmp_path: Path) -> None:
    done = [
        record("start", 1, time=0.0, parts={"startup": 1}),
        record("resume", 1, 0, steps=5, parts={"startup": 1}),
        record("end", 1, 5, 5.0, status="finished", parts={"startup": 1, "train": 5}),
    ]
    again = [
        record("start", 2, time=90000.0, parts={"startup": 1}),
        record("resume", 2, 5, steps=5, parts={"startup": 1}),
        record("end", 2, 5, 0.0, status="finished", parts={"startup": 2}),
    ]
    assert measure(tmp_path / STARTS, done + again) == measure(tmp_path / STARTS, done)
    assert measure_goodput([]) is None
    assert read_starts(tmp_path / "none") == []


def test_starts_in_vain_are_counted(tmp_path: Path) -> None:
    def count(records: list[dict]) -> int:
        measure(tmp_path / STARTS, records)
        return starts_in_vain(read_starts(tmp_path / STARTS))

    assert count(KILLED) == 2  # the third did not come as far as the first
    assert count([*KILLED, record("beat", 3, 31, 20.0, parts={"train": 20})]) == 0
    assert count([*KILLED, record("end", 3, 24, 8.0, status="stopped")]) == 0


seconds = st.floats(0, 1e4)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.lists(st.tuples(st.integers(0, 5), seconds, seconds), max_size=4),
            seconds,
            st.sampled_from(["", "error", "stopped"]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_the_parts_always_sum_to_the_whole(plan: list) -> None:
    """Any number of starts, each from any step (though of none before it), with any beats, ended in any way."""
    path, now, records = Path(os.environ.get("TMPDIR", "/tmp")) / f"starts-{os.getpid()}.jsonl", 1e9, []
    for number, (step, beats, wait, status) in enumerate(plan, 1):
        now += wait if number > 1 else 0.0
        sums = NOTHING | {"startup": 2.0}
        records.append(record("start", number, time=now, parts=sums))
        records.append(record("resume", number, step, parts=sums))
        step_s = 0.0
        for steps, spent, saved in beats:
            sums = sums | {"train": sums["train"] + spent, "save": sums["save"] + saved}
            step, step_s = step + steps, sums["train"] if steps else step_s
            records.append(record("beat", number, step, step_s, skipped_s=step_s / 3, parts=sums))
        if status:
            records.append(record("end", number, step, step_s, skipped_s=step_s / 3, status=status, parts=sums))
        now += sum(sums.values())
    try:
        found = measure(path, records)
    finally:
        path.unlink()
    assert found.wall_s == pytest.approx(now - 1e9, abs=1e-2)
    assert sum(parts(found).values()) == pytest.approx(found.wall_s)
    assert min(parts(found).values()) >= -1e-6


def test_a_run_that_was_stopped_and_went_on(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Real starts on two ranks, after the second of which the newest checkpoint is taken away."""
    began = time.time()
    config = tiny_config(tmp_path, data, "eval.every_steps=3", "eval.window=32", "eval.max_tokens=100")
    gloo(2, train_tiny, config, 3)
    gloo(2, train_tiny, config, 5)
    for name in ("step-00000005",):
        (config.run.folder / "checkpoints" / name).rename(tmp_path / name)
    gloo(2, train_tiny, config, None)
    whole = time.time() - began
    starts = read_starts(config.run.folder / STARTS)
    assert [start.number for start in starts] == [1, 2, 3]
    assert [start.status for start in starts] == ["stopped", "stopped", "finished"]
    assert [(start.points[0].step, start.points[-1].step) for start in starts] == [(0, 3), (3, 5), (4, 6)]
    found = measure_goodput(starts)
    assert found is not None
    span = starts[-1].began_s + starts[-1].elapsed_s - starts[0].began_s
    assert found.wall_s == pytest.approx(span, abs=1e-3)
    assert span <= whole
    assert sum(parts(found).values()) == pytest.approx(found.wall_s)
    assert (found.lost_steps, found.starts) == (1, 3)
    assert all(value > 0 for key, value in parts(found).items() if key != "skipped_s")
    check_what_is_shown(config.run.folder, found)


def check_what_is_shown(folder: Path, found: Goodput) -> None:
    status = read_status(folder)
    assert status.goodput == found
    table = format_status([status], as_json=False)
    assert f"{found.fraction:.1%}" in table
    assert "lost steps, trained again (1)" in table
    shown = json.loads(format_status([status], as_json=True))
    assert shown["goodput"]["starts"] == 3
    assert shown["run"] == (folder / "run_id").read_text().strip()
    starts = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert {(entry["run"], entry["start"]) for entry in starts} == {(shown["run"], number) for number in (1, 2, 3)}
    curves = with_starts(read_curves(folder / "metrics.jsonl", {}), read_starts(folder / STARTS))
    tokens = dict(zip(curves.train["step"], curves.train["tokens"], strict=True))
    assert list(curves.restarts) == [tokens[3], tokens[4]]
    assert list(curves.lost) == [(tokens[4], tokens[5])]
    page = write_report(folder).read_text()
    assert "<h2>Time</h2>" in page
    assert "started again 2 times" in page


def test_kill_9_loses_no_record(tmp_path: Path, data: Path) -> None:
    config = tiny_file(tmp_path, data, steps=99999, every_steps=3)
    command = [sys.executable, "-m", "headrace", "train", str(config)]
    began = time.time()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    path = tmp_path / "tiny" / STARTS
    while not (path.exists() and '"kind": "save"' in path.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = time.time()
    done = subprocess.run([*command, "--until", "1"], stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    first, second = read_starts(path)
    assert began - 1 < first.began_s < first.began_s + first.elapsed_s < killed
    assert first.parts["startup"] > 0.1  # from the start of the process: loading torch is part of it
    assert (first.status, second.status) == ("", "stopped")
    assert second.points[0].step in {point.step for point in first.points}
    found = measure_goodput([first, second])
    assert found is not None
    assert sum(parts(found).values()) == pytest.approx(found.wall_s)
    assert found.wall_s == pytest.approx(second.began_s + second.elapsed_s - first.began_s, abs=1e-3)


def test_a_process_knows_when_it_began() -> None:
    """Long enough ago for the processor time that this thread has had since, and the same each time."""
    began = process_began_s()
    assert time.time() - began > time.thread_time() - 0.02
    assert process_began_s() == pytest.approx(began, abs=0.05)


def test_a_line_cut_short_is_ended_and_starts_go_on_counting(tmp_path: Path) -> None:
    first = RunClock(tmp_path, time.time())
    first.close()
    with (tmp_path / STARTS).open("a") as file:
        file.write('{"kind": "beat", "sta')
    second = RunClock(tmp_path, time.time())
    second.begin_training(0, 0, 9)
    for step in (1, 2, 3, 4):
        second.step(step, 10 * step)
    second.count_skipped(1)
    second.set_status("finished")
    second.close()
    assert (first.start, second.start) == (1, 2)
    assert first.run_id == second.run_id
    starts = read_starts(tmp_path / STARTS)
    assert [start.status for start in starts] == ["error", "finished"]
    last = starts[1].points[-1]
    assert last.skipped_s == pytest.approx(last.step_s / 4, abs=1e-5)
    assert RunClock(None, 0.0).start == 0


def test_a_full_disk_costs_the_record_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clock = RunClock(tmp_path, time.time())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), clock._descriptor)
    clock.begin_training(0, 0, 9)
    clock.step(1, 10)
    clock.close()
    assert "starts.jsonl cannot be written: No space left on device" in capsys.readouterr().err


def test_wandb_knows_the_run_by_its_id(gloo: Callable, tmp_path: Path, data: Path) -> None:
    pytest.importorskip("wandb")
    config = tiny_config(tmp_path, data, "log.wandb=offline", "train.steps=2")
    gloo(1, train_tiny, config, 1)
    gloo(1, train_tiny, config, None)
    run_id = (config.run.folder / "run_id").read_text().strip()
    folders = sorted((config.run.folder / "wandb").glob("offline-run-*"))
    assert folders
    assert {folder.name.rpartition("-")[2] for folder in folders} == {run_id}


def test_a_step_that_hangs_is_seen_and_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats go on while the main thread stands still; what it stood for counts nowhere once it is killed."""
    monkeypatch.setattr("headrace.pretrain.run_clock.LEAST_BEAT_S", 0.01)
    hung = RunClock(tmp_path, time.time())
    hung.begin_training(0, 0, 9)
    hung.step(1, 10)
    path = tmp_path / STARTS
    count = path.read_text().count('"beat"')
    while path.read_text().count('"beat"') < count + 3:
        time.sleep(0.005)
    hung._stop.set()
    hung._thread.join()
    os.close(hung._descriptor)  # as if killed
    again = RunClock(tmp_path, time.time())
    again.close()
    first, second = read_starts(path)
    assert first.points[-1].step == 1
    assert first.unfinished_s > 0.02
    found = measure_goodput([first, second])
    assert found is not None
    assert found.lost_s == pytest.approx(first.unfinished_s)
    under_way = measure_goodput([first])
    assert under_way is not None
    assert under_way.lost_s == 0.0
