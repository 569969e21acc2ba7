"""Alerts of runs that meet what is told of: each is sent once, with its step and what happened."""

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from headrace.data import Batch
from headrace.pretrain import saver
from headrace.pretrain.checkpoint.storage import PieceWriter
from headrace.pretrain.config import Config
from headrace.pretrain.engine import Engine
from headrace.pretrain.run_clock import STARTS
from ranks import start_ranks
from tiny import records, tiny_config, train_tiny

# Appends what it is given to the file that its first argument names.
KEEP = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"
HOST = platform.node()


def telling(folder: Path, data: Path, *overrides: str) -> Config:
    """A tiny run whose alerts go to the file `kept`."""
    command = json.dumps([sys.executable, "-c", KEEP, str(folder / "kept")])
    return tiny_config(folder, data, f"alerts.command={command}", *overrides)


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kept").read_text().splitlines()]


def run_in_need(config: Config) -> int:
    """The step a run ends at whose first save finds no room, and whose losses of rows 12 to 19 are a hundredfold."""
    forward_backward, write_data, writes = Engine.forward_backward, PieceWriter.write_data, []

    def worse(self: Engine, batch: Batch) -> tuple[torch.Tensor, int]:
        loss_sum, targets = forward_backward(self, batch)
        return loss_sum * (100.0 if 12 <= batch.first_row < 20 else 1.0), targets

    def write(self: PieceWriter, *words: Any) -> Any:
        writes.append(words)
        if len(writes) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "its-file")
        return write_data(self, *words)

    with (
        mock.patch.object(Engine, "forward_backward", worse),
        mock.patch.object(PieceWriter, "write_data", write),
        mock.patch.object(saver, "FIRST_WAIT_S", 0.0),
    ):
        return train_tiny(config)


def test_a_spike_that_lasts_and_a_save_that_fails(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Of the two spikes in a row the second comes too soon to be told of again; the run goes back, all the same."""
    spikes = ("spikes.deviations=20", "spikes.window=3", "spikes.patience=2", "train.steps=8")
    config = telling(tmp_path, data, *spikes)
    assert gloo(1, run_in_need, config) == [8]
    found = kept(tmp_path)
    assert [(alert["alert"], alert["step"]) for alert in found] == [("save_failed", 2), ("spike", 4), ("rewind", 2)]
    assert {(alert["run"], alert["start"], alert["kept_back"], alert["host"]) for alert in found} == {
        ("tiny", 1, 0, HOST)
    }
    failure, spike, rewind = (alert["text"] for alert in found)
    path = config.run.folder / "checkpoints" / "step-00000002"
    assert failure == (
        f"checkpoint {path} was not saved: No space left on device (rank 0, its-file); there is no earlier checkpoint"
    )
    (record,) = records(config, "rewind")
    first, second, limit = *record["losses"], record["limit"]
    assert spike.startswith(f"loss {first:.4f}, limit {limit:.4f}, gradient norm ")
    assert spike.endswith(": skipped")
    assert rewind == (
        f"the loss of steps 4 to 5 was a spike ({first:.4f}, {second:.4f}; limit {limit:.4f}); "
        "the run goes on from step 2 without its rows"
    )
    starts = map(json.loads, (config.run.folder / STARTS).read_text().splitlines())
    assert [entry["text"] for entry in starts if entry["kind"] == "alert"] == [failure, spike, rewind]


# Rank 1 dawdles, which is looked for less thoroughly than usual; once that was told, it hangs.
TIRED = """
import os, sys, time
from headrace.launch.cli import main
from headrace.parallel import slow
from headrace.pretrain.engine import Engine
slow.LOOKS, slow.PERSISTENT = 20, 1
before = Engine.forward_backward
def forward_backward(self, batch):
    if os.environ["RANK"] == "1":
        time.sleep(0.1)
        if os.path.exists(os.environ["KEPT"]):
            time.sleep(99999)  # here it sleeps
    return before(self, batch)
Engine.forward_backward = forward_backward
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_dawdles_and_then_hangs(tmp_path: Path, data: Path) -> None:
    config = telling(tmp_path, data, "train.steps=9999", "checkpoint.every_steps=0", "watch.margin_s=1")
    (tmp_path / "run.toml").write_text(config.to_toml())
    (tmp_path / "tired.py").write_text(TIRED)
    command = [sys.executable, str(tmp_path / "tired.py"), "train", str(tmp_path / "run.toml")]
    with start_ranks(tmp_path, command, KEPT=str(tmp_path / "kept")) as ranks:
        assert ranks.statuses([0, 1], 200) == [1, 1], ranks.said(0)
    slow, stall = kept(tmp_path)
    assert (slow["alert"], stall["alert"]) == ("slow_rank", "stall")
    (record,) = records(config, "slow_rank")
    own, others = record["own_s"], record["others_s"]
    assert slow["step"] == record["step"]
    assert slow["text"] == f"rank 1 ({HOST}) works {own:.3g} s of a step itself, others {others:.3g} s"
    assert stall["step"] == records(config, "train")[-1]["step"]
    assert stall["text"].startswith(f"rank 1 ({HOST}) did not come to where the others wait in step ")
    assert "time.sleep(99999)" in stall["text"]
    assert f"headrace: error: {stall['text']}" in ranks.said(0)


# Read by every Python that starts: the processes of a run fail in their first step.
CRASHING = """
import os, sys
if "RANK" in os.environ and "train" in sys.orig_argv:
    from headrace.pretrain.engine import Engine
    def forward_backward(self, batch):
        raise RuntimeError("the device fell off")
    Engine.forward_backward = forward_backward
"""


def test_a_crash_loop_is_told_before_it_is_given_up(tmp_path: Path, data: Path) -> None:
    """All as by default: at the beginning of the third start, which is the last."""
    (tmp_path / "run.toml").write_text(telling(tmp_path, data).to_toml())
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "headrace", "train", str(tmp_path / "run.toml"), "--nproc", "1", "--restarts", "3"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("RuntimeError: the device fell off") == 3
    assert ended.stderr.splitlines()[-1] == "headrace: error: 3 starts without a new step: given up"
    (alert,) = kept(tmp_path)
    assert (alert["alert"], alert["start"], alert["step"]) == ("crash_loop", 3, 0)
    assert alert["text"] == "2 starts in a row ended without a new step; see their logs"
