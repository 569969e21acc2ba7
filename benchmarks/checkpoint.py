"""How long a checkpoint holds training up, how fast it is written and read: beside PyTorch's own, and the bare disk.

`python benchmarks/checkpoint.py --mb 1024 --rounds 5 --folder DIR` saves and loads the same tensors, which look like
weights with two moments each, in one process of one thread: by Headrace beside training (`checkpoint.asynchronous`, the
default) and blocking, with and without reading back what was written (runs read back, since they remove older
checkpoints); by torch.distributed.checkpoint (DCP) with its FileSystemWriter, blocking and `async_save`; and as bare
bytes. All in turns, each round from the first to the last; medians of wall seconds, since disks are no matter of CPU
time. Every save ends on the disk (fsync); every load begins with files that the system is told to forget.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from headrace.parallel.mesh import start_world, stop_world
from headrace.pretrain.alerts import AlertConfig, Alerts
from headrace.pretrain.checkpoint import load_checkpoint, save_checkpoint
from headrace.pretrain.config import CheckpointConfig
from headrace.pretrain.resume import Facts, Progress
from headrace.pretrain.saver import Saver

MIB = 1 << 20


def make_tensors(mb: int) -> dict[str, torch.Tensor]:
    """Matrices of 16 MiB and vectors of 8 KiB in float32, each with two moments, `mb` MiB in all or a little more."""
    tensors: dict[str, torch.Tensor] = {}
    layer = 0
    while sum(tensor.nbytes for tensor in tensors.values()) < mb * MIB:
        for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
            tensors[f"{kind}.{layer}.matrix"] = torch.randn(2048, 2048)
            tensors[f"{kind}.{layer}.vector"] = torch.randn(2048)
        layer += 1
    return tensors


def forget(folder: Path) -> None:
    """Let the system drop what it holds of the files in `folder`; they must be on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Bench:
    """Everything that is timed, on the same tensors, under `folder`."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.tensors = folder, tensors
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.seconds: dict[str, list[float]] = {}
        self.cpu_seconds: dict[str, list[float]] = {}
        self.step = 0
        # The save before is removed in the time of a save, as in a run.
        config = CheckpointConfig(every_steps=1, keep_last=1)
        alerts = Alerts(AlertConfig(), {}, lambda kind, facts: None, is_first=True)
        self.saver = Saver(config, folder / "beside", tensors, Facts({}, {}), None, alerts)

    def time(self, name: str, action: Callable[[], object]) -> None:
        """Run `action` and keep its seconds, and those of all threads on a CPU, under `name`."""
        started, on_cpu = time.perf_counter(), time.process_time()
        action()
        self.cpu_seconds.setdefault(name, []).append(time.process_time() - on_cpu)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def round(self) -> None:
        """Save and load by everything once."""
        self.step += 1
        self.time("stall, headrace", lambda: self.saver.save(Progress(self.step), must=False))
        self.time("background, headrace", self.saver.finish)
        for name, keep_last in (("blocking, headrace, read back", 1), ("blocking, headrace", None)):
            folder = self.folder / f"blocking-{keep_last}"
            save = lambda folder=folder, keep=keep_last: save_checkpoint(
                folder, self.step, self.tensors, extra={}, keep_last=keep
            )
            self.time(name, save)
        ours = self.folder / "blocking-None"
        path = ours / f"step-{self.step:08}"
        self._rivals()
        forget(self.folder)
        self.time("load, headrace", lambda: load_checkpoint(path, self.targets))
        self._check()
        reader = FileSystemReader(self.folder / "dcp")
        self.time("load, DCP", lambda: dcp.load(self.targets, storage_reader=reader))
        self._check()
        self.time("load, bare bytes", self._read_bare)
        for name in ("dcp", "dcp-async", "blocking-None"):
            shutil.rmtree(self.folder / name)
        (self.folder / "bare").unlink()

    def _rivals(self) -> None:
        writer = FileSystemWriter(self.folder / "dcp")
        self.time("blocking, DCP", lambda: dcp.save(dict(self.tensors), storage_writer=writer))
        futures = []
        writer = FileSystemWriter(self.folder / "dcp-async")
        self.time("stall, DCP", lambda: futures.append(dcp.async_save(dict(self.tensors), storage_writer=writer)))
        self.time("background, DCP", lambda: futures[0].result())
        self.time("blocking, bare bytes", self._write_bare)

    def _check(self) -> None:
        """What was loaded is what was saved; clear it for the next."""
        for name, tensor in self.tensors.items():
            assert torch.equal(self.targets[name], tensor), name
            self.targets[name].zero_()

    def _write_bare(self) -> None:
        with open(self.folder / "bare", "wb", buffering=0) as file:
            for tensor in self.tensors.values():
                file.write(tensor.numpy().data.cast("B"))
            os.fsync(file.fileno())

    def _read_bare(self) -> None:
        with open(self.folder / "bare", "rb", buffering=0) as file:
            for tensor in self.targets.values():
                file.readinto(tensor.numpy().data.cast("B"))

    def table(self) -> str:
        """Markdown: seconds, and MB a second."""
        lines = ["| what | seconds | range | MB/s | CPU-seconds |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, found in self.seconds.items():
            middle = self.median(name)
            spread = f"{min(found):.3f}-{max(found):.3f}"
            on_cpu = statistics.median(self.cpu_seconds[name])
            lines.append(f"| {name} | {middle:.3f} | {spread} | {self.num_bytes / middle / 1e6:,.0f} | {on_cpu:.3f} |")
        return "\n".join(lines)


def main() -> None:
    """Print the table and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="MiB of tensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured (default: the system's for temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_world()
    if dist.get_world_size() > 1:
        raise SystemExit("run it in one process")
    folder = Path(tempfile.mkdtemp(prefix="headrace-checkpoint-", dir=options.folder))
    try:
        bench = Bench(folder, make_tensors(options.mb))
        for _ in range(options.rounds):
            bench.round()
    finally:
        shutil.rmtree(folder)
        stop_world()
    print(f"{bench.num_bytes / 1e6:,.0f} MB in {len(bench.tensors)} tensors, {options.rounds} rounds, medians\n")
    print(bench.table())
    by_round = zip(bench.seconds["blocking, DCP"], bench.seconds["stall, headrace"], strict=True)
    ratios = [theirs / ours for theirs, ours in by_round]
    print(
        f"\na blocking DCP save is {statistics.median(ratios):.1f} times as long as headrace's stall "
        f"(rounds {min(ratios):.1f}-{max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
