"""Other implementations of the SSD recurrence, where they are installed, called with our arguments."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_operators import Outputs

# The default of its layers, and what is sometimes faster.
MAMBA_CHUNKS = (256, 128)

Rival = Callable[..., Outputs]


def ssd_rivals(device: str, *, reset: bool) -> tuple[dict[str, Rival], dict[str, str]]:
    """Callables by name, `rival(x, dt, A, B, C, D, initial_state, reset)`, and why the others are not there.

    With `reset`, only those that know document starts.
    """
    if device == "cpu":
        return {}, dict.fromkeys(("mamba_ssm", "flash-linear-attention"), "needs a GPU")
    rivals: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    try:
        scan = _load("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        for chunk in MAMBA_CHUNKS:
            rivals[f"mamba_ssm, chunk {chunk}"] = partial(_mamba, scan, chunk)
    except Exception as error:  # an installation may break in any way
        missing["mamba_ssm"] = f"{type(error).__name__}: {error}"
    if reset:
        missing["flash-linear-attention"] = "takes no document starts in rows of a batch"
        return rivals, missing
    try:
        rivals["flash-linear-attention"] = partial(_gla, _load("fla", "fla.ops.simple_gla").chunk_simple_gla)
    except Exception as error:
        missing["flash-linear-attention"] = f"{type(error).__name__}: {error}"
    return rivals, missing


def _load(package: str, module: str) -> Any:
    """Import a module; where its package's own imports fail (extensions not built), without running those."""
    try:
        return importlib.import_module(module)
    except Exception:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
        return importlib.import_module(module)


def _mamba(scan: Callable[..., Outputs], chunk: int, *tensors: Tensor | None) -> Outputs:
    x, dt, A, B, C, D, initial_state, reset = tensors
    documents = None if reset is None else reset.cumsum(1, dtype=torch.int32)
    return scan(x, dt, A, B, C, chunk, D=D, initial_states=initial_state, seq_idx=documents, return_final_states=True)


def _gla(scan: Callable[..., Outputs], *tensors: Tensor) -> Outputs:
    """Its heads have keys and queries of their own, and steps are in the values: what its users have to do is timed."""
    x, dt, A, B, C, D, initial_state, _ = tensors
    heads_per_group = x.shape[2] // B.shape[2]
    keys, queries = (t.repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    values = (x * dt[..., None]).to(x.dtype)
    state = None if initial_state is None else initial_state.transpose(2, 3)
    y, final = scan(queries, keys, values, g=dt * A, scale=1.0, initial_state=state, output_final_state=True)
    return (y + x * D.to(x.dtype)[:, None]).to(x.dtype), final.transpose(2, 3)
