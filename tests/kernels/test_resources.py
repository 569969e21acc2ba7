"""Every kernel compiles for every architecture: no spilled registers, no more shared memory than there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["ssd_", "conv1d_", "cross_entropy", "norm_", "swiglu", "expert_", "grouped_"])
def test_kernels_compile_without_spills(tmp_path: Path, part: str) -> None:
    script = ROOT / "benchmarks/kernel_resources.py"
    command = [sys.executable, str(script), "--dtypes", "bf16", "--only", part, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {one["arch"] for one in found} == ARCHITECTURES
