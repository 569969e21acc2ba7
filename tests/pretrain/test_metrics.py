"""Records of a run on a disk that is full, or takes a line in pieces: they wait, and training goes on."""

import errno
import io
import json
from pathlib import Path

import pytest

from headrace.errors import MachineError
from headrace.pretrain import metrics as metrics_module
from headrace.pretrain.metrics import Metrics
from tiny import records, tiny_config

OPTIMIZER = {"name": "AdamW", "state_bytes_per_parameter": 8.0}


class Disk(io.FileIO):
    """A file on a disk that takes seven bytes at a time, and none while it is full."""

    full = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[:7])


def open_metrics(tmp_path: Path, data: Path) -> Metrics:
    config = tiny_config(tmp_path, data)
    config.run.folder.mkdir()
    metrics = Metrics(config, config.run.folder / "metrics.jsonl")
    metrics.file.close()
    metrics.file = Disk(config.run.folder / "metrics.jsonl", "ab")
    return metrics


def test_records_wait_for_room(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = open_metrics(tmp_path, data)
    metrics.start(0, 0, "torch", OPTIMIZER)
    metrics.save({"step": 1})
    metrics.file.full = True
    for step in (2, 3):
        metrics.save({"step": step})
    assert len(records(tiny_config(tmp_path, data), "save")) == 1
    metrics.file.full = False
    metrics.save({"step": 4})
    metrics.close()
    assert [record["step"] for record in records(tiny_config(tmp_path, data), "save")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("records wait, and training goes on") == 1


def test_what_waits_after_a_rewind_is_dropped(tmp_path: Path, data: Path) -> None:
    metrics = open_metrics(tmp_path, data)
    metrics.save({"step": 1})
    metrics.file.full = True
    for step in (2, 3, 4):
        metrics.save({"step": step})
    rewound = {"step": 2, "spike": (3, 4), "rows": (8, 16), "rewinds": 1}
    metrics.rewind(tmp_path / "tiny" / "metrics.jsonl", rewound)
    metrics.save({"step": 3})
    metrics.close()
    lines = map(json.loads, (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines())
    assert [(line["kind"], line["step"]) for line in lines] == [("save", 1), ("save", 2), ("rewind", 2), ("save", 3)]


def test_a_disk_that_stays_full(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start ends at once; later what waits has an end."""
    metrics = open_metrics(tmp_path, data)
    metrics.file.full = True
    with pytest.raises(MachineError, match="cannot be written: No space left on device"):
        metrics.start(0, 0, "torch", OPTIMIZER)
    monkeypatch.setattr(metrics_module, "MOST_WAITING", 2)
    metrics.save({"step": 1})
    with pytest.raises(MachineError, match="cannot be written: No space left on device"):
        metrics.save({"step": 2})
    metrics.close()
    assert "3 records are lost" in capsys.readouterr().err
