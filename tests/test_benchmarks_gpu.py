"""The scripts for a GPU run as a whole on the CPU: every part prints its table, every kernel gets rows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TITLES = (
    "Accuracy",
    "Bitwise repeatability",
    "More than 2^31 elements",
    "Launches a call",
    "Cold start",
    "SSD: times",
    "Other operators: times",
)


def dry_run(script: str, *options: str) -> str:
    command = [sys.executable, f"benchmarks/{script}", "--dry-run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.interpreted
@pytest.mark.slow
def test_every_part_of_the_kernel_benchmark_prints(tmp_path: Path) -> None:
    out = dry_run("kernels_gpu.py", "--write", str(tmp_path / "kernels.md"))
    tables = {part.split("\n")[0]: part for part in (tmp_path / "kernels.md").read_text().split("\n## ")[1:]}
    assert len(tables) == len(TITLES)
    for title, (heading, text) in zip(TITLES, tables.items(), strict=True):
        assert heading.startswith(title)
        assert text.strip() in out
        assert len(re.findall(r"^\|", text, re.M)) > 2  # rows below the head
    for operator in ("ssd_scan", "selective_scan", "causal_conv1d", "linear_cross_entropy", "embedding"):
        assert f"| {operator} |" in tables["Accuracy"]
    assert "Nothing failed." in out


@pytest.mark.interpreted
@pytest.mark.slow
def test_tuning_goes_through_every_kernel_and_writes_nothing() -> None:
    table = ROOT / "kernels/tiles.toml"
    before = table.read_bytes()
    out = dry_run("tune.py")
    assert table.read_bytes() == before
    for kernel in tomllib.loads(before.decode()):
        section = out.split(f"would write:\n[{kernel}]\n")[1].split("would write:")[0]
        assert re.search(r"^interpreter\.\w+ = \{.*\}  # .*interpreter, \d{4}-", section, re.M)


def test_new_rows_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from tune import with_rows

    first = "# head\n\n[a]\nsm_80.any = { block = 1 }  # note\ngfx942.any = { block = 2 }\n"
    text = first + "\n[b]\nsm_80.any = { block = 3 }\n"
    added = with_rows(text, "a", "sm_90", {"any": ({"block": 4}, "measured")}, "sm_80")
    assert added.replace("sm_90.any = { block = 4 }  # measured\n", "") == text
    assert "note\nsm_90" in added
    replaced = with_rows(added, "a", "sm_80", {"any": ({"block": 5}, "")}, "sm_80")
    assert "sm_80.any = { block = 5 }\nsm_90.any" in replaced
    assert replaced.endswith("[b]\nsm_80.any = { block = 3 }\n")
