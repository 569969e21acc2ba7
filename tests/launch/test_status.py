"""`headrace status` and `headrace ls`: what a folder shows, in every state, without loading torch."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.launch.compare import differences
from headrace.launch.status import find_runs, format_status, list_checkpoints, read_status

TRAIN = {"kind": "train", "step": 3, "tokens": 3000, "loss": 2.5, "tokens_per_s": 1234.5}
EVAL = {"kind": "eval", "step": 2, "bits_per_byte": 1.25}


def make_run(
    folder: Path, steps: int = 10, records: tuple[dict, ...] = (TRAIN, EVAL), tail: str = "", saved: int = 2
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"[train]\nsteps = {steps}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    (folder / ".lock").write_text("process 7 on node1")
    checkpoint = folder / "checkpoints" / f"step-{saved:08}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_bytes(b"x" * 1_500_000)
    (folder / "checkpoints" / ".tmp-step-00000003").mkdir()
    return folder


def test_a_run_that_nobody_runs(tmp_path: Path) -> None:
    found = read_status(make_run(tmp_path / "a", tail='{"kind": "train", "st'))
    assert (found.state, found.step, found.steps, found.loss) == ("not running", 3, 10, 2.5)
    assert (found.bits_per_byte, found.checkpoint, found.tokens) == (1.25, "step-00000002", 3000)


def test_a_run_that_runs_is_not_disturbed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = read_status(folder)
    assert (found.state, found.detail) == ("running", "as process 7 on node1")
    assert (folder / ".lock").read_text() == "process 7 on node1"


def test_finished_and_stopped(tmp_path: Path) -> None:
    assert read_status(make_run(tmp_path / "a", steps=3, saved=3)).state == "finished"
    assert read_status(make_run(tmp_path / "c", steps=3)).state == "not running"  # killed in the last save
    folder = make_run(tmp_path / "b")
    (folder / "STOPPED").write_text('{"step": 3, "reason": "SIGTERM"}\n')
    assert (read_status(folder).state, read_status(folder).detail) == ("stopped", "by SIGTERM")
    (folder / "STOPPED").write_text("{cut")
    assert read_status(folder).state == "not running"


def test_a_run_without_a_first_record(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.toml").write_text("= broken")
    found = read_status(folder)
    assert (found.state, found.step, found.steps, found.loss, found.checkpoint) == ("not running", 0, None, None, None)
    assert "-" in format_status([found], as_json=False)


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    many = tuple({**TRAIN, "step": step} for step in range(1, 20_000))
    assert read_status(make_run(tmp_path / "a", steps=99_999, records=many)).step == 19_999


def test_records_of_another_shape_are_passed_over(tmp_path: Path) -> None:
    odd = ({**TRAIN, "step": "4"}, {**TRAIN, "step": -4}, {**TRAIN, "loss": [2.0]}, {**EVAL, "bits_per_byte": "low"})
    folder = make_run(tmp_path / "a", records=(TRAIN, EVAL, *odd, {"kind": ["train"]}), tail="[1, 2]\n" + "[" * 100_000)
    (folder / "run_id").write_bytes(b"\xff\xfe\xfa")
    (folder / "starts.jsonl").write_text('{"kind": "start", "start": 1}\n')
    found = read_status(folder)
    assert (found.step, found.loss, found.bits_per_byte, found.run, found.goodput) == (3, 2.5, 1.25, None, None)
    (folder / "metrics.jsonl").write_text(json.dumps({**TRAIN, "loss": None}))
    assert read_status(folder).loss is None


@pytest.mark.parametrize("name", [".lock", "STOPPED", "run_id", "config.toml", "metrics.jsonl", "starts.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[]", b"[" * 5000, b"null\n7"], ids=range(5))
def test_damaged_files_do_not_stop_it(tmp_path: Path, name: str, content: bytes) -> None:
    folder = make_run(tmp_path / "a")
    (folder / name).write_bytes(content)
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "running" in format_status([read_status(folder)], as_json=False)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", steps=3, saved=3)
    monkeypatch.chdir(tmp_path)
    found = [read_status(folder) for folder in find_runs([])]
    assert [json.loads(line)["name"] for line in format_status(found, as_json=True).splitlines()] == ["a", "b"]
    head, first, second = format_status(found, as_json=False).splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert "3 of 10" in first
    assert "finished" in second
    assert "step-00000002  1.5" in list_checkpoints(tmp_path / "runs" / "a")
    monkeypatch.setattr(os, "scandir", lambda path: [path / "removed meanwhile"])
    assert list_checkpoints(tmp_path / "runs" / "a").split() == ["checkpoint", "MB", "saved"]


@pytest.mark.parametrize(
    "command", [["status", "--help"], ["status", "nowhere"], ["ls", "nowhere"], ["diff", "a", "b"], ["status"]]
)
def test_neither_torch_nor_a_traceback(tmp_path: Path, command: list[str]) -> None:
    watch = "import sys, runpy; sys.argv[0] = 'headrace'\ntry: runpy.run_module('headrace', run_name='__main__')\n"
    watch += "finally: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", watch, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "False False"
    if "--help" not in command:
        assert done.returncode == 2
        assert done.stderr.startswith("headrace: error: ")
        assert len(done.stderr.splitlines()) == 1


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        list_checkpoints(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.toml").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        list_checkpoints(folder)


def test_what_differs_is_shown(tmp_path: Path) -> None:
    for name, lr, commit in (("a", 0.1, "abc"), ("b", 0.2, "abc"), ("c", 0.1, "abd")):
        folder = make_run(tmp_path / name)
        (folder / "config.toml").write_text(f'[run]\nname = "{name}"\n[optimizer]\nlr = {lr}\n')
        (folder / "manifest.json").write_text(
            json.dumps({"commit": commit, "resumed_at": ord(name), "run": name, "start": ord(name)})
        )
    assert differences(tmp_path / "a", tmp_path / "a") == []
    assert differences(tmp_path / "a", tmp_path / "b") == ["config.optimizer.lr: 0.1 -> 0.2"]
    assert differences(tmp_path / "a", tmp_path / "c") == ['record.commit: "abc" -> "abd"']
    for name, text in (("a", "0f"), ("c", "1e")):
        (tmp_path / name / "source.json").write_text(json.dumps({"versions": {}, "files": {"model/lm.py": text}}))
    assert differences(tmp_path / "a", tmp_path / "c")[1:] == ['code.model/lm.py: "0f" -> "1e"']


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", b"{cut", "cannot be read"),
        ("manifest.json", b"[1, 2]", "does not hold what a run writes there"),
        ("manifest.json", b"\xff\xff", "cannot be read"),
        ("manifest.json", b"null", "does not hold what a run writes there"),
        ("manifest.json", b'{"a":' * 50_000, "cannot be read"),
        ("source.json", b"[]", "does not hold what a run writes there"),
        ("source.json", b"{}", "does not hold what a run writes there"),
        ("source.json", b'{"files": ["model/lm.py"]}', "does not hold what a run writes there"),
        ("config.toml", b"= broken", "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    for run in ("a", "b"):
        (make_run(tmp_path / run) / "manifest.json").write_text("{}")
    assert differences(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        differences(tmp_path / "a", tmp_path / "b")
    assert str(caught.value).startswith(f"{tmp_path / 'b' / name} ")
    assert "\n" not in str(caught.value)


def test_dates_are_compared_too(tmp_path: Path) -> None:
    for run, day in (("a", 1), ("b", 2)):
        folder = make_run(tmp_path / run)
        (folder / "manifest.json").write_text("{}")
        (folder / "config.toml").write_text(f"day = 2026-01-0{day}\n")
    assert differences(tmp_path / "a", tmp_path / "b") == ['config.day: "2026-01-01" -> "2026-01-02"']
