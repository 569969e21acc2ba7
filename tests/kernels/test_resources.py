"""Every kernel compiles for every architecture: no spilled registers, no more shared memory than there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
# The selective scan has a kernel for each size of state: all its compilations would take minutes.
PARTS = {
    **dict.fromkeys(
        ("ssd_", "conv1d_", "cross_entropy", "norm_", "swiglu", "chunk_sums", "expert_", "grouped_", "adamw_8bit"),
        ARCHITECTURES,
    ),
    "selective_scan": ["sm_90"],
}
# Beside bfloat16, which every part is compiled for: a tile of its own.
IN_FLOAT16 = {"ssd_gradients": ["sm_90"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("part", "archs", "dtype"),
    [
        *((part, archs, "bf16") for part, archs in PARTS.items()),
        *((part, archs, "fp16") for part, archs in IN_FLOAT16.items()),
    ],
)
def test_kernels_compile_without_spills(tmp_path: Path, part: str, archs: list[str], dtype: str) -> None:
    found = tmp_path / "found.json"
    options = ["--dtypes", dtype, "--only", part, "--json", str(found), "--archs", *archs]
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {one["arch"] for one in json.loads(found.read_text())} == set(archs)
