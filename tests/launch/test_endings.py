"""How a command ends: its exit status by whose fault it was, and nothing for a line that cannot be shown."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.data.manifest import read_manifest
from headrace.errors import MachineError, UserError
from headrace.launch import cli
from tiny import records, tiny_config, tiny_file


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x"), 2),
        (MachineError("x"), 1),
        (FileNotFoundError(errno.ENOENT, "no such file", "f"), 2),
        (PermissionError(errno.EACCES, "permission denied", "f"), 2),
        (OSError(errno.EIO, "input/output error", "f"), 1),
        (OSError(errno.ENOSPC, "no space left on device", "f"), 1),
    ],
)
def test_whose_fault_it_was(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "parse", lambda _: argparse.Namespace(run=run))
    assert cli.main([]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_a_file_that_cannot_be_read_tells_whose_fault_it_was(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """Where a disk fails `--restarts` tries again."""

    def fail(_: Path) -> bytes:
        raise OSError(number, os.strerror(number), "f")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=f"cannot read .*: {os.strerror(number)}") as caught:
        read_manifest(data)
    assert caught.value.status == status


@pytest.mark.fault("stderr on a full disk, or its reader gone", "lines are lost; the run goes on")
@pytest.mark.parametrize("where", ["full disk", "closed pipe"])
def test_lines_that_cannot_be_shown_end_nothing(tmp_path: Path, data: Path, where: str) -> None:
    config = tiny_file(tmp_path, data)
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "headrace", "train", str(config), "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stderr = full if where == "full disk" else writer
    assert subprocess.run(command, stderr=stderr, env=environment, check=False, timeout=120).returncode == 0
    os.close(full)
    os.close(writer)
    assert [record["step"] for record in records(tiny_config(tmp_path, data), "train")] == [1, 2, 3, 4, 5, 6]
