"""`headrace verify`: one line a checkpoint, every kind of damage named, and no torch in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.launch import verify as verify_module
from headrace.launch.cli import main
from headrace.pretrain.checkpoint import save_checkpoint
from headrace.pretrain.checkpoint_files import verify_checkpoint
from headrace.pretrain.checkpoint_files.verify import Verified

TENSORS = {"model.a": torch.arange(24.0).view(4, 6), "model.b": torch.ones(3).bfloat16(), "model.c": torch.empty(0, 2)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        save_checkpoint(folder / "checkpoints", step, TENSORS, extra={}, rank_tensors={"cpu": torch.arange(5)})
    (folder / "config.toml").touch()
    return folder


def flip(run: Path, step: int, content: torch.Tensor) -> None:
    file = run / "checkpoints" / f"step-{step:08}" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(content.contiguous().view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(data)


def test_a_good_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    paths = [run / "checkpoints" / f"step-{step:08}" for step in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines() == [f"{path}: good, 4 tensors, 0.0 MB" for path in paths]
    assert main(["verify", str(paths[1])]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{paths[1]}: good, 4 tensors, 0.0 MB"]


def test_damage_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 1, TENSORS["model.a"])
    flip(run, 1, torch.arange(5))
    (run / "checkpoints" / "step-00000003" / "rank-00000.safetensors").unlink()
    assert main(["verify", str(run)]) == 1
    one, more, two, three = capsys.readouterr().out.splitlines()
    file = "rank-00000.safetensors"
    assert one.endswith(f"step-00000001: DAMAGED, {file} is not what was written (the hash of 'model.a' differs)")
    assert more == f"  and {file} is not what was written (the hash of 'rank.cpu' differs)"
    assert two.endswith("step-00000002: good, 4 tensors, 0.0 MB")
    assert three.endswith(f"step-00000003: DAMAGED, {file} is missing; 'model.a' and 3 more cannot be read")
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert main(["verify", str(run / "checkpoints" / "step-00000002")]) == 1
    assert capsys.readouterr().out.endswith("step-00000002: DAMAGED, manifest.json is missing\n")


@pytest.mark.parametrize("cut", [1, 100])
def test_cut_files(run: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {}
    for name in ("rank-00000.safetensors", "manifest.json"):
        file = run / "checkpoints" / "step-00000002" / name
        whole[file] = file.read_bytes()
        file.write_bytes(whole[file][:-cut])
        assert main(["verify", str(file.parent)]) == 1
        assert f"DAMAGED, {name} " in capsys.readouterr().out
        file.write_bytes(whole[file])
        assert main(["verify", str(file.parent)]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("when", ["before it is read", "in the middle"])
def test_a_run_goes_on_and_removes_its_older_ones(
    run: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = run / "checkpoints" / "step-00000002"

    def check(path: Path) -> Verified:
        if path != gone:
            return verify_checkpoint(path)
        shutil.rmtree(gone)
        if when == "in the middle":
            return Verified(0, 0, (f"{gone}: rank-00000.safetensors is missing",))
        return verify_checkpoint(path)

    monkeypatch.setattr(verify_module, "verify_checkpoint", check)
    assert main(["verify", str(run)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert all(": good, 4 tensors" in line for line in (first, third))
    assert second.endswith("step-00000002: removed by its run meanwhile")


def test_what_is_no_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").touch()
    for source, words in (
        (tmp_path / "none", "does not exist"),
        (run / "checkpoints" / "step-00000001" / "manifest.json", "manifest.json is a file and no folder; give a run"),
        (tmp_path / "empty", "holds no checkpoint"),
        (run / "checkpoints", "is not a checkpoint"),
    ):
        assert main(["verify", str(source)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("words", [["verify", "RUN"], ["verify", "--help"], ["status", "--help"], ["ls", "--help"]])
def test_without_torch(run: Path, words: list[str]) -> None:
    code = """if True:
        import sys
        from headrace.launch.cli import main
        try:
            status = main(sys.argv[1:])
        except SystemExit as end:
            status = end.code
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        sys.exit(status)
    """
    words = [str(run) if word == "RUN" else word for word in words]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout
