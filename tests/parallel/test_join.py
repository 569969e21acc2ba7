"""Starts that cannot begin: the port is taken, a process does not come, two claim one rank. One line says so."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from headrace.errors import UserError
from headrace.parallel.join import Place, call_roll, read_place
from ranks import free_port
from tiny import tiny_file

HOST = os.uname().nodename


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which someone else listens, and says nothing."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def start(folder: Path, data: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """One process of a run that the environment describes."""
    command = [sys.executable, "-m", "headrace", "train", str(tiny_file(folder, data)), *options]
    told = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **environment}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **told})


def refused(process: subprocess.Popen[str]) -> str:
    """The one line a process says that ends as the user's mistake."""
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    (line,) = said.splitlines()
    return line


@pytest.mark.fault("a port that is in use, for the processes to meet at", "one line with host and port, status 2")
def test_a_busy_port(tmp_path: Path, data: Path, taken: int) -> None:
    """Rank 0 cannot listen; rank 1 reaches someone who does not answer. `--nproc` finds itself another port."""
    names = {"WORLD_SIZE": "2", "MASTER_PORT": str(taken)}
    ranks = [start(tmp_path, data, "parallel.timeout_s=4", RANK=str(rank), **names) for rank in range(2)]
    here = start(tmp_path, data, "--nproc", "2", "train.steps=2", MASTER_PORT=str(taken))
    line = refused(ranks[0])
    assert line.startswith(f"headrace: error: port {taken} of {HOST} is in use")
    assert "set MASTER_PORT to a free one" in line
    assert f"rank 1 ({HOST}): nothing at 127.0.0.1:{taken} answers as rank 0 of a run would" in refused(ranks[1])
    said = here.communicate(timeout=60)[1]
    assert here.returncode == 0, said


@pytest.mark.fault("a rank that does not come at the start", "all others end in time; the line names it")
@pytest.mark.parametrize(("size", "came"), [(3, (0, 1)), (2, (1,))], ids=["the last", "the first"])
def test_a_rank_that_does_not_come(tmp_path: Path, data: Path, size: int, came: tuple[int, ...]) -> None:
    names = {"WORLD_SIZE": str(size), "MASTER_PORT": str(free_port())}
    options = ("parallel.timeout_s=4", "train.batch_rows=6")
    ranks = [start(tmp_path, data, *options, RANK=str(rank), **names) for rank in came]
    address = f"127.0.0.1:{names['MASTER_PORT']}"
    if 0 in came:
        expected = f"headrace: error: 2 of 3 processes came to {address} within 4 s: rank 2 is missing"
        assert refused(ranks[0]).startswith(expected)
        assert ranks[1].communicate(timeout=60)[1] == ""  # rank 0 speaks for both
        assert ranks[1].returncode == 2
    else:
        assert f"rank 1 ({HOST}) found no rank 0 at {address} within 4 s" in refused(ranks[0])
    assert not (tmp_path / "tiny").exists()


def gather(store: dist.Store, ranks: range, size: int, wait_s: float) -> list[str]:
    """What a roll call comes to on each of `ranks`, run in threads."""
    said = [""] * len(ranks)

    def come(rank: int) -> None:
        try:
            call_roll(store, Place(rank, size, "node1", 29500), wait_s, time.monotonic() + wait_s)
        except UserError as error:
            said[rank] = str(error) if error.everywhere else "every rank would print its own"

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_all_say_the_same_of_who_is_missing() -> None:
    said = gather(dist.HashStore(), range(3), 7, 0.5)
    assert len(set(said)) == 1
    assert said[0].startswith("3 of 7 processes came to node1:29500 within 0.5 s: ranks 3-6 are missing; start all")
    assert gather(dist.HashStore(), range(3), 3, 30.0) == [""] * 3


def test_one_too_many_is_refused_at_once() -> None:
    """Two jobs at one port, or two processes of one rank."""
    store = dist.HashStore()
    store.set("size", "2")
    store.set("rank/1", "process 7 on node2")
    place = Place(1, 2, "node1", 29500)
    with pytest.raises(UserError, match="two processes are rank 1 at node1:29500: process 7 on node2 and process"):
        call_roll(store, place, 60.0, time.monotonic() + 60.0)
    place = Place(3, 4, "node1", 29500)
    with pytest.raises(UserError, match="is one of 4 processes, but those that meet at node1:29500 are 2"):
        call_roll(store, place, 60.0, time.monotonic() + 60.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not; start with torchrun or --nproc"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"RANK": "2"}, "RANK=2 must be a number below WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "RANK=1 must be a number below WORLD_SIZE="),
    ],
)
def test_half_a_group(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str) -> None:
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    for name, value in (whole | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        read_place()
