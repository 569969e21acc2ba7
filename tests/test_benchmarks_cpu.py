"""The scripts that time things on a CPU still run: each prints its table, of sizes at which a time means nothing."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def no_group() -> Iterator[None]:
    """What a script leaves of its process group goes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("script", "options", "row"),
    [
        ("checkpoint", "--mb 1 --rounds 1 --folder TMP", "| stall, headrace |"),
        ("layer_cpu", "--length 64 --rounds 1", "| headrace |"),
        ("moe", "--tokens 32 --experts 4 --rounds 1", "| headrace"),
        ("optimizers", "--layers 1 --rounds 1 --only Muon", "Muon  "),
        ("ssd_cpu", "--shape 1 64 2 16 1 16 --rounds 1", "| headrace |"),
        ("virtual_segments", "--shape 1 256 2 16 1 16 --segments 1 2 --rounds 1", "| 2 |"),
    ],
)
def test_a_benchmark_prints_its_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_group: None,
    script: str,
    options: str,
    row: str,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, *options.replace("TMP", str(tmp_path)).split()])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert row in capsys.readouterr().out
