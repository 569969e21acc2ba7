"""A run that hangs: found by the time that steps take, every stack written down, the one that did not come named."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from headrace.parallel import recorder
from headrace.parallel.hang import (
    HANG,
    NO_HANG,
    HangSearch,
    Stand,
    describe,
    find_missing,
    main_thread,
    page,
    waits_now,
)
from headrace.parallel.heartbeat import Beat
from headrace.parallel.pulse import Pulse, WatchConfig
from headrace.parallel.recorder import MOST_GROUPS, last_collectives, read_recorder
from headrace.parallel.watch import Watch
from ranks import start_ranks
from tiny import tiny_file

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

# Two ranks of one process, the first of which stays behind, and a folder in which nothing can be written to its end.
HUNG_FOLDER = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from headrace.parallel.hang import HangSearch
from headrace.parallel.pulse import Pulse, WatchConfig
from headrace.parallel.watch import Watch
folder = Path(sys.argv[1])
for name in ("hang-rank-0.txt", "hang-rank-1.txt", "hang.txt"):
    os.mkfifo(folder / name)
    os.mkfifo(folder / f".{name}-{os.getpid()}.tmp")
os.mkfifo(folder / "last words")
store = dist.HashStore()
searches = [HangSearch(rank, 2, Pulse(WatchConfig(margin_s=0.5)), folder, 2.0) for rank in range(2)]
watches = [Watch(rank, 2, 60.0, lambda: store, "a test", search) for rank, search in enumerate(searches)]
with watches[0], watches[1]:
    for watch in watches:
        watch.last_words = lambda line: (folder / "last words").write_text(line)
        for number in range(40 + watches.index(watch)):
            watch.pulse.step(number)
    time.sleep(99999)  # here both stand
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


@pytest.mark.fault("SIGSTOP of a rank; a rank that sleeps for ever", "found, named with every rank's stacks; all end")
@pytest.mark.parametrize("how", ["sleeps", "is stopped"])
def test_a_hang_is_found_written_down_and_ended(tmp_path: Path, data: Path, how: str) -> None:
    """Long before `parallel.timeout_s`, which is 10 minutes here."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    config = tiny_file(tmp_path, data, steps=99999)
    command = [sys.executable, str(script), "train", str(config), "watch.margin_s=2", "checkpoint.every_steps=0"]
    with start_ranks(tmp_path, command, FALL_ASLEEP=str(tmp_path / "FALL_ASLEEP")) as ranks:
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"train"') < 25:
            assert ranks.processes[0].poll() is None, ranks.said(0)
            time.sleep(0.05)
        if how == "sleeps":
            (tmp_path / "FALL_ASLEEP").touch()
        else:
            ranks.processes[1].send_signal(signal.SIGSTOP)
        ended = [0, 1] if how == "sleeps" else [0]
        assert ranks.statuses(ended, 120) == [1] * len(ended)
    logs = tmp_path / "tiny" / "logs"
    page = (logs / "hang.txt").read_text()
    said = ranks.said(0)
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


def stuck(folder: Path, rank: int) -> HangSearch:
    """The search of one of three ranks, in a step that may take a hundredth of a second."""
    pulse = Pulse(WatchConfig(allowance_s=0.01))
    pulse.step(7)
    return HangSearch(rank, 3, pulse, folder, 0.1)


@pytest.mark.parametrize(
    ("keeper", "who"),
    [(None, "rank 0 (n0)"), ("the launcher at n0:1", "the launcher at n0:1")],
    ids=["rank", "launcher"],
)
def test_a_store_that_is_silent_is_its_keepers_fault(tmp_path: Path, keeper: str | None, who: str) -> None:
    """Without it a process hears of nobody, which says nothing of the others."""
    watch = Watch(1, 3, 60.0, dist.HashStore, keeper, stuck(tmp_path, 1))  # no thread talks with the store
    watch._roll.hear({0: Beat(1, 7, "n0")})
    with mock.patch.object(watch, "_leave", side_effect=lambda line: watch._stop.set()) as leave:
        watch._judge()
    assert leave.call_args.args[0].startswith(
        f"{who}, which keeps the store, does not answer; no step was finished for "
    )
    text = (tmp_path / "hang.txt").read_text()
    assert "rank 0 (n0): cannot be asked; last heard of after step 7" in text
    assert "does not answer" not in text.partition("\n")[2]


def test_a_store_that_answers_shows_who_does_not(tmp_path: Path) -> None:
    store, beats = dist.HashStore(), {0: Beat(1, 7, "n0")}
    store.set(HANG, NO_HANG)
    first, second = stuck(tmp_path, 0), stuck(tmp_path, 1)
    for seconds in (0.2, 0.05):  # it is patient; it asks
        assert second.judge(seconds, beats, "rank 0 (n0)") == ""
    for search in (second, first, second):
        search.exchange(store, store.get(HANG).decode())
    line = second.judge(1.0, beats, "rank 0 (n0)")
    assert line.startswith("rank 2 (host unknown) does not answer; no step was finished for 1 s; see ")


def test_a_look_at_the_main_thread_stops_no_process() -> None:
    """As it did in CPython 3.11, whose list of threads is locked while it is looked through (issue 106883)."""
    assert subprocess.run([sys.executable, "-c", LOOKER], timeout=120, check=False).returncode == 0


@pytest.mark.fault("a file system that hangs, in a run that hangs", "the rank is named and all end all the same")
def test_a_folder_that_hangs_keeps_nobody_alive(tmp_path: Path) -> None:
    """Opening a FIFO that nobody reads blocks, as files of a server that is gone do."""
    command = [sys.executable, "-c", HUNG_FOLDER, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stderr
    (line,) = set(ended.stderr.splitlines())
    assert line.startswith(
        f"headrace: error: rank 0 ({HOST}) did not come to step 41, where the others wait, and stands"
    )
    assert "hang.txt cannot be written: no answer yet)" in line


def entry(group: str, number: int, what: str, state: str = "completed", is_p2p: bool = False) -> dict:
    """As torch 2.13 writes it, without what nobody reads."""
    return {
        "process_group": [group, "" if group == "7" else f"mesh_{group}"],
        "collective_seq_id": number,
        "p2p_seq_id": int(is_p2p),
        "is_p2p": is_p2p,
        "profiling_name": f"nccl:{what}",
        "state": state,
    }


def recording(*entries: dict, **ranks: str) -> bytes:
    config = {name: {"name": name, "desc": name, "ranks": members} for name, members in ranks.items()}
    return json.dumps({"version": "2.10", "pg_config": config, "pg_status": {}, "entries": entries}).encode()


def reads(recorded: bytes) -> Stand:
    """All stand where the host reads a tensor: nothing that Python shows tells them apart."""
    return Stand(7, "step", False, ("loss.py:1 in take: int(count)",), "", last_collectives(recorded))


ALL = "[0, 1, 2, 3]"


def test_who_is_behind_in_a_collective() -> None:
    """The host of rank 2 did not come to an all_reduce; rank 1 does more than the others in a group of its own."""
    waits = [
        entry("dp", 16, "all_gather"),
        entry("dp", 17, "all_reduce", "started"),
        entry("dp", 18, "all_gather", "x"),
    ]
    stands = {rank: reads(recording(*waits, dp=ALL)) for rank in range(4)}
    alone = [entry("tp", 900, "all_reduce"), entry("tp", 900, "send 0->1", "completed", is_p2p=True)]
    stands[1] = reads(recording(*alone, *waits, dp=ALL, tp="[1]"))
    assert find_missing(4, stands) == ([], "")
    # That it has seen its send done tells nothing of the collective that it has the number of.
    stands[2] = reads(recording(entry("dp", 16, "all_gather"), entry("dp", 16, "send 2->3", is_p2p=True), dp=ALL))
    what = "did not come to collective 17 (all_reduce) of group mesh_dp"
    assert find_missing(4, stands) == ([2], what)
    assert describe(4, stands, {2: "node1"}, 12.0).startswith(f"rank 2 (node1) {what} and stands at loss.py:1")
    text = page("line", 3.0, 4, stands, {rank: Beat(host="node1") for rank in range(4)})
    assert "    group mesh_dp: came to collective 18 (all_gather), waits for 17 (all_reduce)\n" in text
    assert "    group mesh_tp: came to collective 900 (all_reduce)\n" in text
    assert "    group mesh_dp: came to collective 16 (all_gather)\n" in text
    assert Stand.unpack(stands[1].pack().encode()) == stands[1]


def test_the_last_of_those_that_wait_for_each_other() -> None:
    """Rank 3 does not come to its group with rank 2, which for that does not come to its group with rank 0."""
    done, waits = entry("tp", 5, "all_reduce"), entry("tp", 6, "all_reduce", "scheduled")
    tp = {0: "[0, 1]", 1: "[0, 1]", 2: "[2, 3]", 3: "[2, 3]"}
    begun, late = entry("dp", 8, "reduce_scatter"), entry("dp", 9, "reduce_scatter", "scheduled")
    dp = {0: "[0, 2]", 1: "[1, 3]", 2: "[0, 2]", 3: "[1, 3]"}
    entries = {0: [done, begun, late], 1: [done, begun, late], 2: [done, begun, waits], 3: [done, begun]}
    stands = {rank: reads(recording(*entries[rank], dp=dp[rank], tp=tp[rank])) for rank in range(4)}
    assert find_missing(4, stands)[0] == [3]
    # Who waits for a message of another is not the last either, if there is one who does not.
    receives = entry("dp", 8, "recv 1<-0", "started", is_p2p=True)
    stands[2] = reads(recording(done, begun, receives, dp=dp[2], tp=tp[2]))
    assert find_missing(4, stands) == ([3], "did not come to collective 9 (reduce_scatter) of group mesh_dp")
    # In a circle all are named: two groups were gone to in different orders.
    first = reads(recording(entry("a", 2, "barrier", "started"), entry("b", 1, "barrier"), a="[0, 1]", b="[0, 1]"))
    second = reads(recording(entry("a", 1, "barrier"), entry("b", 2, "barrier", "started"), a="[0, 1]", b="[0, 1]"))
    assert find_missing(2, {0: first, 1: second})[1].startswith("did not come to collective 2 (barrier) of group mesh_")


def test_a_host_that_ran_ahead_blames_nobody() -> None:
    """The device of one hangs in a collective that all came to; another reads a tensor early and asks for no more."""
    hangs = entry("7", 17, "all_reduce", "started")
    ahead = reads(recording(hangs, entry("7", 18, "all_gather", "scheduled")))
    early = reads(recording(hangs))
    assert find_missing(4, {0: early, 1: ahead, 2: ahead, 3: ahead}) == ([], "")
    assert str(early.reached[0]) == "group 7: came to collective 17 (all_reduce), waits for 17 (all_reduce)"


def test_a_batch_of_messages_is_done_when_its_last_entry_is() -> None:
    parts = [
        entry("pp", 3, "send 0->1", "scheduled", is_p2p=True),
        entry("pp", 3, "recv 0<-1", "scheduled", is_p2p=True),
    ]
    for state in ("completed", "started"):
        (reached,) = last_collectives(recording(entry("pp", 3, "barrier"), *parts, entry("pp", 3, "coalesced", state)))
        assert (reached.number, reached.what, reached.pending) == (3, "barrier", 0)
        assert reached.talks == (state == "started")


def test_a_recording_of_another_kind_tells_nothing() -> None:
    good = entry("dp", 16, "all_gather")
    assert last_collectives(recording(good)[:-9]) == ()
    for odd in (b"", b"\xff", b"[]", b"17", b'{"entries": 3}', b'{"pg_config": [], "entries": []}', b"[" * 99999):
        assert last_collectives(odd) == ()
    bad = [
        {},
        3,
        {**good, "process_group": "dpi"},
        {**good, "process_group": [1, 2]},
        {**good, "collective_seq_id": "17"},
        {**good, "profiling_name": 1},
    ]
    assert [found.number for found in last_collectives(recording(*bad, good))] == [16]
    assert last_collectives(recording({**good, "profiling_name": "gloo:all_reduce", "state": "scheduled"})) == ()


def test_what_goes_through_the_store_is_bounded() -> None:
    """Of very many groups those are kept in which it waits, and those used last."""
    waits = entry("first", 1, "x" * 999, "started")
    reached = last_collectives(recording(waits, *(entry(f"{group:099}", 1, "barrier") for group in range(500))))
    assert len(reached) == MOST_GROUPS
    assert reached[-1].name == "mesh_first"
    assert len(Stand(1, "step", True, (), "", reached).pack()) < 400 * MOST_GROUPS


def test_the_recorder_of_nccl_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds with NCCL have two; the one that all builds have knows nothing of NCCL there."""
    monkeypatch.setattr(recorder.c10d, "_dump_fr_trace_json", lambda: b'{"version": "2.10"}', raising=False)
    monkeypatch.setattr(recorder.c10d, "_dump_nccl_trace_json", lambda: b'{"entries": [1]}', raising=False)
    assert read_recorder() == b'{"entries": [1]}'
    monkeypatch.setattr(recorder.c10d, "_dump_nccl_trace_json", lambda: b"{}", raising=False)
    assert read_recorder() == b""
