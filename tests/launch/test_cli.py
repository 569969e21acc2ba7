"""The command line: every mistake gets one line and status 2, never a traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import __version__
from headrace.launch.cli import main, parse
from tiny import tiny_file


@pytest.fixture
def config(tmp_path: Path, data: Path) -> str:
    return str(tiny_file(tmp_path, data))


def headrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_overrides_may_stand_anywhere() -> None:
    options = parse(["train", "a.toml", "train.steps=3", "--nproc", "2", "run.name=b"])
    assert (options.config, options.nproc, options.overrides) == ("a.toml", 2, ["train.steps=3", "run.name=b"])


@pytest.mark.parametrize("arguments", [["train", "a.toml", "--nprocs", "2"], ["eval", "run", "x=1"], ["fly"], []])
def test_unknown_words_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert "usage: headrace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "none.toml"], "config file none.toml does not exist"),
        (["train", "CONFIG", "model.d_modle=8"], "unknown key model.d_modle; did you mean d_model?"),
        (["train", "CONFIG", "train.steps=-1"], "train.steps=-1 must be at least 1"),
        (["train", "CONFIG", "model.pattern=mamba2 atention"], "attention"),
        (["train", "CONFIG", "data.folder=nowhere"], "nowhere"),
        (["train", "CONFIG", "data.seq_len=100000000"], "seq_len"),
        (["train", "CONFIG", "model.vocab_size=8"], "model.vocab_size=8 is below"),
        (["train", "CONFIG", "--nproc", "0"], "--nproc=0 must be at least 1"),
        (["train", "CONFIG", "--until", "0"], "--until=0 must be at least 1"),
        (["train", "CONFIG", "--nproc", "3"], "batch_rows=4 does not split over 3"),
        (["prepare", "--corpus", "EMPTY", "--out", "OUT"], "text"),
        (["prepare", "--corpus", "EMPTY/none", "--out", "OUT"], "none"),
        (["prepare", "vocabsize=3"], "unknown key vocabsize"),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["export", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "nowhere"),
        (["report", "EMPTY"], "metrics"),
        (["report", "CONFIG"], "metrics"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    arguments: list[str], part: str, config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"CONFIG": config, "EMPTY": str(tmp_path / "empty"), "OUT": str(tmp_path / "out")}
    assert main([_named(argument, names) for argument in arguments]) == 2
    error = capfd.readouterr().err
    assert part in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("headrace: error: ")]) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "tiny").exists()


def _named(argument: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        argument = argument.replace(name, value)
    return argument


def test_version_and_help() -> None:
    assert headrace("--version").stdout.strip() == f"headrace {__version__}"
    shown = headrace("--help").stdout
    assert all(command in shown for command in ("prepare", "train", "eval", "export", "generate", "report"))


def test_a_process_that_fails_ends_the_others(config: str, data: Path, tmp_path: Path) -> None:
    """Whichever rank reads the damaged document stops; the launcher must not leave the other waiting for it."""
    copy = shutil.copytree(data, tmp_path / "damaged")
    (shard,) = (copy / "train").glob("*.tar")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2 // 512 * 512 + 600
    content[middle : middle + 4] = b"flip"
    shard.write_bytes(content)
    result = headrace("train", config, "--nproc", "2", f"data.folder={copy}", "train.steps=200")
    assert result.returncode == 2
    assert str(shard) in result.stderr
    assert result.stderr.count("headrace: error:") == 1
    assert "Traceback" not in result.stderr


def test_torchrun_prints_one_line_for_all_ranks(config: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "headrace", "train", config, "model.vocab_size=8"], capture_output=True, text=True, timeout=240
    )
    assert result.returncode != 0
    assert result.stderr.count("headrace: error:") == 1


def test_half_an_environment_is_refused(
    config: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", config]) == 2
    assert "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["train", "preflight"])
@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x' in the environment must be a whole number of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number of at least 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment must be a whole number of at least 0"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK='one' in the environment must be a whole number of at least 0"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"RANK": "3"}, "RANK=3 must be below WORLD_SIZE, which is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
    ids=str,
)
def test_numbers_in_the_environment(
    command: str,
    given: dict[str, str],
    part: str,
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main([command, config]) == (1 if command == "preflight" and "LOCAL_RANK" in given else 2)
    told = capfd.readouterr()
    assert part in told.out + told.err
    assert "Traceback" not in told.err


def test_wandb_offline_writes_its_run_and_unreachable_is_one_line(config: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    result = headrace("train", config, "log.wandb=offline", "train.steps=2")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "tiny" / "wandb").glob("offline-run-*/*.wandb"))
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    result = headrace("train", config, "log.wandb=online", "run.name=online", "train.steps=2", **unreachable)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "headrace: error: wandb cannot be reached" in result.stderr
