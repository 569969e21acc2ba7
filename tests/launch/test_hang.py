"""A run that hangs: found by the time that steps take, every stack written down, the one that did not come named."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.parallel.hang import Stand, describe, find_missing, main_thread, waits_now
from tiny import CONFIG

# One thread looks, and leaves something behind whose end lets go of the interpreter; meanwhile others come and go.
LOOKER = """
import gc, os, threading, time
from headrace.parallel.hang import waits_now
class Finalized:
    def __init__(self):
        self.itself = self
    def __del__(self):
        time.sleep(0.0001)
def look():
    for _ in range(2000):
        Finalized()
        waits_now()
for _ in range(6):
    threading.Thread(target=time.sleep, args=(999,), daemon=True).start()
looker = threading.Thread(target=look, daemon=True)
gc.set_threshold(5)
looker.start()
while looker.is_alive():
    passer = threading.Thread(target=int)
    passer.start()
    passer.join()
assert gc.isenabled()
os._exit(0)
"""

HOST = os.uname().nodename
# A rank that sleeps for ever in a forward pass once the file FALL_ASLEEP is there. It lives: its threads go on beating.
SLEEPER = """
import os, sys, time
from headrace.launch.cli import main
from headrace.pretrain.engine import Engine
before = Engine.forward_backward
def forward_backward(self, batch):
    if os.environ["RANK"] == "1" and os.path.exists(os.environ["FALL_ASLEEP"]):
        time.sleep(99999)  # here it sleeps
    return before(self, batch)
Engine.forward_backward = forward_backward
sys.exit(main(sys.argv[1:]))
"""


def start_ranks(folder: Path, data: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks that save never and end never."""
    config, script = folder / "tiny.toml", folder / "sleeper.py"
    config.write_text(
        CONFIG.replace("[data]", f'root = "{folder}"\n[data]\nfolder = "{data}"').replace("= 6", "= 99999")
    )
    script.write_text(SLEEPER)
    command = [sys.executable, str(script), "train", str(config), "watch.margin_s=2", "checkpoint.every_steps=0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        told |= {"OMP_NUM_THREADS": "1", "FALL_ASLEEP": str(folder / "FALL_ASLEEP")}
        with (folder / f"stderr{rank}").open("w") as stderr:
            ranks.append(subprocess.Popen(command, stderr=stderr, env={**os.environ, **told}))
    return ranks


@pytest.mark.fault("SIGSTOP of a rank; a rank that sleeps for ever", "found, named with every rank's stacks; all end")
@pytest.mark.parametrize("how", ["sleeps", "is stopped"])
def test_a_hang_is_found_written_down_and_ended(tmp_path: Path, data: Path, how: str) -> None:
    """Long before `parallel.timeout_s`, which is 10 minutes here."""
    ranks = start_ranks(tmp_path, data)
    try:
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"train"') < 25:
            assert ranks[0].poll() is None, (tmp_path / "stderr0").read_text()
            time.sleep(0.05)
        if how == "sleeps":
            (tmp_path / "FALL_ASLEEP").touch()
        else:
            ranks[1].send_signal(signal.SIGSTOP)
        ended = ranks if how == "sleeps" else ranks[:1]
        assert [process.wait(120) for process in ended] == [1] * len(ended)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = tmp_path / "tiny" / "logs"
    page = (logs / "hang.txt").read_text()
    said = (tmp_path / "stderr0").read_text()
    assert said.count("headrace: error: ") == 1
    assert "start the run again to go on from its newest checkpoint" in said
    assert str(logs / "hang.txt") in said
    assert "in take_steps" in (logs / "hang-rank-0.txt").read_text()
    if how == "sleeps":
        assert page.startswith(f"rank 1 ({HOST}) did not come to where the others wait in step ")
        assert "sleeper.py:8 in forward_backward: time.sleep(99999)" in page.partition("\n")[0]
        assert "sleeper.py" in (logs / "hang-rank-1.txt").read_text()
    else:
        assert page.startswith(f"rank 1 ({HOST}) does not answer; no step was finished for ")
        assert not (logs / "hang-rank-1.txt").exists()
    assert "gloo keeps no flight recorder" in page


def test_a_thread_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some instructions belong to no line; a thread that looks at just such a moment must go on."""
    code = SimpleNamespace(co_filename=__file__, co_name="f")
    frame = SimpleNamespace(f_code=code, f_lineno=None, f_back=None)
    monkeypatch.setattr(sys, "_current_frames", lambda: {threading.main_thread().ident: frame})
    assert waits_now() is False
    assert main_thread() == ((f"{__file__}:0 in f: ",), False)


def stand(step: int, waits: bool) -> Stand:
    return Stand(step, "step", waits, (f"model.py:{step} in forward: y = f(x)",), "")


def test_who_is_missing() -> None:
    waiting = {rank: stand(7, True) for rank in range(4)}
    assert find_missing(5, waiting)[0] == [4]
    assert find_missing(4, waiting | {2: stand(6, True)}) == ([2], "did not come to step 8, where the others wait,")
    assert find_missing(4, waiting | {2: stand(7, False)})[0] == [2]
    assert find_missing(4, waiting) == ([], "")
    assert find_missing(4, dict.fromkeys(range(4), stand(7, False))) == ([], "")
    hosts = dict.fromkeys(range(4), "node1")
    assert describe(4, waiting, hosts, 12.0) == "no step was finished for 12 s, and no rank stands out"
    line = describe(4, waiting | {2: stand(7, False)}, hosts, 12.0)
    assert line.startswith("rank 2 (node1) did not come to where the others wait in step 8, and stands at model.py:7")
    assert Stand.unpack(waiting[0].pack().encode()) == waiting[0]


def test_a_look_at_the_main_thread_stops_no_process() -> None:
    """As it did in CPython 3.11, whose list of threads is locked while it is looked through (issue 106883)."""
    assert subprocess.run([sys.executable, "-c", LOOKER], timeout=120, check=False).returncode == 0
