"""One choice for all operators: the definition, the PyTorch path, or the Triton kernels.

`auto` takes Triton on a GPU and PyTorch elsewhere, and for float64 everywhere. A backend that is asked for by name runs
or is refused with the reason; `auto` on a GPU says once, as a warning, when it cannot take Triton.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Of the process and not of a context: activations are recomputed in autograd's own thread, by the same backend.
_of_run = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make `backend` what operators of this process take that are called with `auto`.

    Raises ValueError for an unknown name.
    """
    global _of_run
    _check_name(backend)
    before, _of_run = _of_run, backend
    try:
        yield
    finally:
        _of_run = before


def choose_backend(operator: str, backend: str, x: Tensor, obstacle: str | None = None) -> str:
    """Return `reference`, `torch` or `triton` for a call of `operator` on tensors like `x`.

    `obstacle` says why the operator's own kernels cannot take these sizes, None when they can. Raises ValueError for an
    unknown backend, and for `triton` where it cannot run, with the reason.
    """
    _check_name(backend)
    if backend == "auto":
        backend = _of_run
    if backend in ("reference", "torch"):
        return backend
    if backend == "auto" and (x.device.type != "cuda" or x.dtype == torch.float64):
        return "torch"
    reason = triton_obstacle(x) or obstacle
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"{operator}: Triton cannot run: {reason}; ask for backend 'torch' or 'auto'")
    _warn_once(f"{operator} runs without its Triton kernel: {reason}")
    return "torch"


def asked_for(backend: str) -> str:
    """The backend that is asked for by name, by a call or else for the run; `auto` when by neither."""
    return _of_run if backend == "auto" else backend


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on the CPU (`TRITON_INTERPRET=1`, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_obstacle(x: Tensor) -> str | None:
    """Why no Triton kernel can take tensors like `x`, or None."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')} inputs have no Triton path"
    if interpreting():
        # The interpreter's bfloat16 products are garbage.
        return None if x.dtype == torch.float32 else "interpreted kernels take float32 only"
    if x.device.type != "cuda":
        return f"tensors are on {x.device.type}, kernels run on GPUs"
    return None


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; use one of {', '.join(BACKENDS)}")


# As torch.compiler.disable, which loads the compiler at once: a second in every process, a launcher's too.
@torch._disable_dynamo
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


_warned: set[str] = set()
