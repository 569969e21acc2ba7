"""The folder `kernels/` seen from the repository root, where transformers takes it for a package of that name."""

import subprocess
import sys
from pathlib import Path

import pytest

import headrace

PROGRAM = """
import sys
import torch
from headrace.kernels import ssd_scan

before = torch.ops.headrace.ssd_chunked.default._schema
import kernels
assert kernels.__file__ == {init!r}, kernels.__file__
assert not [name for name in sys.modules if name.startswith("kernels.")]
assert not hasattr(kernels, "__version__")

from transformers import Mamba2Config, Mamba2ForCausalLM
config = Mamba2Config(
    vocab_size=8, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, state_size=4, num_hidden_layers=1
)
Mamba2ForCausalLM(config)(torch.arange(6)[None]).logits.sum().backward()

for _ in range(3):
    x, dt, A, B = torch.randn(1, 5, 2, 3), torch.rand(1, 5, 2), -torch.rand(2), torch.randn(1, 5, 1, 4)
    y, _ = ssd_scan(x, dt, A, B, B)
assert y.isfinite().all()
"""


def test_stock_mamba_runs_beside_our_operators_from_the_repository_root() -> None:
    pytest.importorskip("transformers")
    root = Path(headrace.__file__).parent
    program = PROGRAM.format(init=str(root / "kernels" / "__init__.py"))
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
