"""The one place that launches Triton kernels, so that what is launched can be recorded, counted and compiled unrun."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import interpreting


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was launched with, tensors included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__


@dataclass
class Recording:
    """Launches in order; with `arch`, tiles are chosen as for that architecture, and meta tensors are not run."""

    arch: str | None = None
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("launch_recording", default=None)


@contextmanager
def record_launches(arch: str | None = None) -> Iterator[list[Launch]]:
    """Collect what `launch` is given, in this context."""
    recording = Recording(arch)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **arguments: Any) -> None:
    """Launch a Triton kernel on the device of its tensors. On meta tensors it is only recorded.

    Nothing is launched for an empty grid.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments, num_warps, num_stages))
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    if tensor.device.type == "meta" or 0 in grid:
        return
    with torch.cuda.device_of(tensor):
        # Contracting a product and a sum is what every release did unless told otherwise; said here because the
        # default changes.
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def architecture(x: Tensor) -> str:
    """The architecture that kernels on `x` run on: `sm_90`, `gfx942` or `interpreter`; recordings may set another."""
    recording = _recording.get()
    if recording is not None and recording.arch is not None:
        return recording.arch
    if interpreting():
        return "interpreter"
    return _device_architecture(x.device.index or 0)


@cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def num_processors(x: Tensor) -> int:
    """Multiprocessors of the device of `x`; those of the part in question where nothing runs."""
    arch = architecture(x)
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}.get(arch, 4)
