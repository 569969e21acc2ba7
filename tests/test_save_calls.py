"""A process that is killed in any system call of a save: the earlier checkpoint stays, or the new one is whole."""

import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fault_table import times
from headrace.pretrain.checkpoint import latest_checkpoint, load_full, save_checkpoint

CALLS = "openat,write,pwrite64,fsync,rename,mkdir,unlink,unlinkat,rmdir,close"


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((50, i + 1), float(step)) for i in range(3)}


def save_under(folder: Path, *strace: str) -> tuple[int, str]:
    """Save step 2 in a forked process that strace has got hold of; its status and what strace wrote."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        save_checkpoint(folder, 2, tensors(2), extra={}, keep_last=1)
        os._exit(0)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child), *strace], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if "attached" not in first:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.skip(f"strace cannot trace here: {first.strip()}")
    os.write(writer, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = tracer.communicate()[1]
    os.close(reader)
    os.close(writer)
    return status, text


@pytest.mark.fault(
    "kill -9 in each system call of a save", "the earlier checkpoint or the new one, whole; the next save works"
)
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.timeout(1800)
def test_killed_in_any_system_call(tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    save_checkpoint(tmp_path / "first", 1, tensors(1), extra={}, keep_last=1)
    shutil.copytree(tmp_path / "first", tmp_path / "count")
    status, listed = save_under(tmp_path / "count", "-e", f"trace={CALLS}", "-c")
    assert status == 0
    # A row: percent of time, seconds, microseconds a call, calls, errors where there are any, name.
    rows = [line.split() for line in listed.splitlines() if re.match(r"\s*[0-9.]+\s+[0-9.]+\s", line)]
    counts = {row[-1]: int(row[3]) for row in rows if row[-1] != "total"}
    assert counts["rename"] >= 1
    points = [(name, number) for name, calls in sorted(counts.items()) for number in range(1, calls + 1)]
    if times(1, 2) == 1:
        renames = [point for point in points if point[0] == "rename"]
        points = renames + random.Random(0).sample(points, 6)
    old = new = 0
    for name, number in points:
        folder = tmp_path / f"{name}-{number}"
        shutil.copytree(tmp_path / "first", folder)
        status, _ = save_under(folder, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}")
        latest = latest_checkpoint(folder)
        assert latest is not None, (name, number)
        step = int(latest.name[-8:])
        assert status == -signal.SIGKILL or step == 2
        assert all(tensor.eq(step).all() for tensor in load_full(latest).values())
        old, new = old + (step == 1), new + (step == 2)
        save_checkpoint(folder, 3, tensors(3), extra={}, keep_last=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
        shutil.rmtree(folder)
    print(f"killed in {len(points)} system calls: {old} times the earlier checkpoint was left, {new} times the new one")
    record_property("tried", len(points))
    assert old
    assert new
