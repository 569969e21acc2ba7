"""A rank that dies or falls silent: the others end too, each with one line that says who and after which step."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from headrace.errors import UserError
from headrace.parallel.watch import PREFIX, Watch, last_step
from ranks import start_ranks
from tiny import tiny_file

# A process that another one is to say the end of, with its standard streams as they are.
LEAVER = """
import sys, time
import torch.distributed as dist
from headrace.parallel.watch import Watch
store = dist.HashStore()
print("something that stdout still holds", end="")
with Watch(0, 2, 2.0, lambda: store, keeper="a test") as watch:
    if sys.argv[1] == "main thread":
        watch.leave("rank 1 is gone")
    time.sleep(99999)  # until the watch finds that nobody beats
"""
TIMEOUT_S = 10.0
LINE = r"headrace: error: {} \({}\) {}.*; last finished step \d+; start the run again"
HOST = os.uname().nodename
PROGRESS = re.compile(r"\d\d:\d\d:\d\d ")


def endless(folder: Path, data: Path) -> list[str]:
    """The command of a run that goes on."""
    return [sys.executable, "-m", "headrace", "train", str(tiny_file(folder, data, steps=99999))]


def wait_for_training(folder: Path, process: subprocess.Popen) -> None:
    """Until some steps are done and some beats have told of them."""
    metrics = folder / "tiny" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 3:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.5)


def check_line(text: str, who: str, what: str) -> None:
    (line,) = (line for line in text.splitlines() if not PROGRESS.match(line))
    assert re.match(LINE.format(who, HOST, what), line), text


@pytest.mark.fault(
    "kill -9, SIGSTOP of a rank without a launcher", "the others end in time; rank, host and last step named"
)
@pytest.mark.parametrize(
    ("size", "victim", "how"), [(3, 1, signal.SIGKILL), (2, 0, signal.SIGSTOP)], ids=["kill-1", "stop-0"]
)
def test_those_left_say_who_is_missing(tmp_path: Path, data: Path, size: int, victim: int, how: signal.Signals) -> None:
    """Rank 0 keeps the store that all beats go through."""
    command = [*endless(tmp_path, data), "train.batch_rows=6", f"parallel.timeout_s={TIMEOUT_S}"]
    with start_ranks(tmp_path, command, size) as ranks:
        wait_for_training(tmp_path, ranks.processes[0])
        ranks.processes[victim].send_signal(how)
        others = [rank for rank in range(size) if rank != victim]
        assert ranks.statuses(others, TIMEOUT_S + 5) == [1] * len(others)
    for rank in others:
        check_line(ranks.said(rank), f"rank {victim}", "has not been heard of for")


@pytest.mark.fault("SIGSTOP of a rank under a launcher", "the other ends in time; rank, host and last step named")
def test_under_a_launcher_a_silent_rank_is_named_by_the_other(tmp_path: Path, data: Path) -> None:
    command = [*endless(tmp_path, data), "--nproc", "2", f"parallel.timeout_s={TIMEOUT_S}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_training(tmp_path, launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    other, victim = map(int, children)
    os.kill(victim, signal.SIGSTOP)
    deadline = time.monotonic() + TIMEOUT_S + 5
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    _, text = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    check_line(text, "rank 1", "has not been heard of for")


@pytest.mark.fault("a damaged shard of the data, met by one rank", "all end; the file and the rank named")
def test_an_error_of_one_rank_is_reported_by_the_others(tmp_path: Path, data: Path) -> None:
    """Whichever rank reads the damaged document."""
    copy = shutil.copytree(data, tmp_path / "damaged")
    (shard,) = (copy / "train").glob("*.tar")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2 // 512 * 512 + 600
    content[middle : middle + 4] = b"flip"
    shard.write_bytes(content)
    with start_ranks(tmp_path, endless(tmp_path, copy)) as ranks:
        statuses = ranks.statuses([0, 1], 200)
    assert sorted(statuses) == [1, 2]
    failed, other = statuses.index(2), statuses.index(1)
    assert ranks.said(failed).count("headrace: error: ") == 1
    assert str(shard) in ranks.said(failed)
    assert "Traceback" not in ranks.said(failed)
    check_line(ranks.said(other), f"rank {failed}", f"left with an error: .*{shard.name}")


@pytest.fixture
def pair() -> tuple[Watch, Watch]:
    """The watches of two ranks that beat through one store, five times a second."""
    store = dist.HashStore()
    watches = [Watch(rank, 2, 2.0, lambda: store, keeper="a test") for rank in range(2)]
    return watches[0], watches[1]


def test_blame_names_who_stopped_beating(pair: tuple[Watch, Watch]) -> None:
    first, second = pair
    with first, second:
        second.pulse.step(3)
        time.sleep(0.5)
        assert first.blame(RuntimeError("size mismatch")) is None
        second._stop.set()  # as if killed
        time.sleep(0.3)
        line = first.blame(RuntimeError("[gloo/pair.cc:1] Connection closed by peer [::1]:1"))
    assert line is not None
    assert line.startswith(f"rank 1 ({HOST}) has not been heard of for ")


def test_blame_gives_the_reason_of_who_left(pair: tuple[Watch, Watch]) -> None:
    first, second = pair
    with second:
        with pytest.raises(UserError), first:
            raise UserError("the disk is full")
        line = second.blame(dist.DistBackendError("NCCL error"))
    assert line == f"rank 0 ({HOST}) left with an error: the disk is full"


def test_a_watch_of_one_starts_no_thread() -> None:
    before = threading.active_count()
    with Watch(0, 1, 600.0, dist.HashStore) as watch:
        watch.pulse.step(1)
        assert threading.active_count() == before
        assert watch.blame(RuntimeError("Connection closed by peer")) is None


def test_a_watch_of_one_tells_its_launcher_how_far_it_came() -> None:
    """Nobody judges it: an error is its own, at once."""
    store = dist.HashStore()
    before = threading.active_count()
    with Watch(0, 1, 2.0, lambda: dist.PrefixStore(PREFIX, store), keeper="a test") as watch:
        assert threading.active_count() == before + 1
        watch.pulse.step(7)
        deadline = time.monotonic() + 20
        while last_step(store, 1) != 7:  # as if killed now
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert watch.blame(RuntimeError("Connection closed by peer")) is None
        watch.pulse.step(8)
    assert last_step(store, 1) == 8
    assert threading.active_count() == before


def test_a_run_that_ends_stops_its_threads(pair: tuple[Watch, Watch]) -> None:
    before = threading.active_count()
    with pair[0], pair[1]:
        assert threading.active_count() == before + 4
        time.sleep(0.3)
    assert threading.active_count() == before


def full_pipe() -> tuple[int, int]:
    """A pipe that takes nothing more, as nobody reads it."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writes, b"x" * 65536)
    os.set_blocking(writes, True)
    return reads, writes


@pytest.mark.fault("stdout and stderr full, closed or not read", "a process that is to end does, with status 1")
@pytest.mark.parametrize(
    ("who", "how"),
    [("judge", "full disk"), *(("main thread", how) for how in ("full disk", "closed pipe", "closed", "not read"))],
)
def test_a_process_ends_although_it_cannot_say_why(who: str, how: str) -> None:
    command = [sys.executable, "-c", LEAVER, who]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    opened: list[int] = []
    if how == "full disk":
        opened = [os.open("/dev/full", os.O_WRONLY)]
    elif how != "closed":
        reads, writes = full_pipe()
        opened = [writes, reads]
        if how == "closed pipe":
            os.close(opened.pop())
    streams = {"stdout": opened[0], "stderr": opened[0]} if opened else {}
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        assert subprocess.run(command, **streams, env=buffered, timeout=120, check=False).returncode == 1
    finally:
        for descriptor in opened:
            os.close(descriptor)
