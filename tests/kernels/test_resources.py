"""Every kernel compiles for every architecture: no spilled registers, no more shared memory than there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.mark.timeout(900)
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    script = ROOT / "benchmarks/kernel_resources.py"
    command = [sys.executable, str(script), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    kernels = {one["kernel"] for one in found}
    assert {"_ssd_scan_kernel", "_ssd_gradients_kernel", "_norm_forward_kernel", "_conv1d_forward_kernel"} <= kernels
    for kernel in kernels:
        assert {one["arch"] for one in found if one["kernel"] == kernel} == ARCHITECTURES
