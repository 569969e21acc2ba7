"""A few steps under torch.profiler, when the file `PROFILE` asks for them; nothing else of a run changes."""

import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = "profile"
TOP_OPERATORS = 25


class StepProfiler:
    """Traces steps on the process that has a folder; others count them with it, and until it is asked nothing is done.

    Args:
        folder: the run folder; None on the others.
        num_steps: traced each time.
        device: of the run.
    """

    def __init__(self, folder: Path | None, num_steps: int, device: torch.device) -> None:
        self._folder, self._num_steps, self._device = folder, num_steps, device
        self._left = 0
        self._first = 0
        self._profiler: Any = None

    def ask(self, step: int) -> None:
        """Trace from the step after `step` on; while steps are traced, nothing new begins."""
        if self._left:
            return
        self._left, self._first = self._num_steps, step + 1
        if self._folder is None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def step(self) -> bool:
        """A step is finished; whether it is the last that is traced, the same on all."""
        if not self._left:
            return False
        self._left -= 1
        return not self._left

    def close(self) -> Path | None:
        """Write what was traced so far, if anything was: `step-N.json.gz`, N the first step, and `step-N.txt`.

        A disk that is full costs the trace and not the run: then there is None.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None or self._folder is None:
            return None
        profiler.stop()
        folder = self._folder / FOLDER
        path = folder / f"step-{self._first}.json.gz"
        try:
            folder.mkdir(exist_ok=True)
            _write_trace(profiler, path)
            order = f"self_{self._device.type}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=TOP_OPERATORS, max_name_column_width=60)
            (folder / f"step-{self._first}.txt").write_text(table)
        except OSError:
            return None
        return path


def _write_trace(profiler: Any, path: Path) -> None:
    """The Chrome trace, compressed, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    descriptor, plain = tempfile.mkstemp(suffix=".json", dir=path.parent)
    os.close(descriptor)
    try:
        profiler.export_chrome_trace(plain)
        with open(plain, "rb") as source, gzip.open(aside, "wb", compresslevel=5) as file:
            while block := source.read(1 << 20):
                file.write(block)
        aside.replace(path)
    finally:
        os.unlink(plain)
        aside.unlink(missing_ok=True)
