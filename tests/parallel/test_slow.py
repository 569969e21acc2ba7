"""Which ranks make the others wait: by what they tell of themselves, and in a run with a rank that dawdles."""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.parallel.heartbeat import Beat
from headrace.parallel.slow import FACTOR, LEAST_LOSS, PERSISTENT, SlowRank, SlowRanks
from ranks import start_ranks
from tiny import tiny_file

DAWDLER = """
import os, sys, time
from headrace.launch.cli import main
from headrace.pretrain.engine import Engine
before = Engine.forward_backward
def forward_backward(self, batch):
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
    return before(self, batch)
Engine.forward_backward = forward_backward
sys.exit(main(sys.argv[1:]))
"""


def told(*own_s: float | None) -> dict:
    return {rank: ("node", None if own is None else (own, 1.0)) for rank, own in enumerate(own_s)}


def test_only_who_stays_slow_is_told_of_and_once() -> None:
    slow = SlowRanks()
    for _ in range(PERSISTENT - 1):
        assert slow.compare(told(0.5, 0.5, 0.9, None)) == []
    assert slow.compare(told(0.5, 0.5, 0.5, None)) == []
    for _ in range(PERSISTENT - 1):
        assert slow.compare(told(0.5, 0.5, 0.9, None)) == []
    assert slow.compare(told(0.5, 0.4, 0.9, None)) == [SlowRank(2, "node", 0.9, 0.45)]
    assert slow.compare(told(0.5, 0.5, 0.9, None)) == []


def test_a_little_is_not_slow() -> None:
    slow = SlowRanks()
    for _ in range(2 * PERSISTENT):
        assert slow.compare(told(0.10, 0.10, 0.25)) == []  # far above 1.3 times, but nobody loses much
        assert slow.compare(told(0.80, 0.80, 1.00)) == []
        assert slow.compare(told(0.90)) == []


@given(st.lists(st.none() | st.floats(0, 10) | st.sampled_from([0.5, 1.0]), max_size=9))
def test_each_is_compared_with_the_median_of_all_others(own_s: list[float | None]) -> None:
    expected = []
    for rank, own in enumerate(own_s):
        others = [other for at, other in enumerate(own_s) if at != rank and other is not None]
        if own is not None and others and own > max(FACTOR * median(others), median(others) + LEAST_LOSS):
            expected.append(SlowRank(rank, "node", own, median(others)))
    slow = SlowRanks()
    assert [slow.compare(told(*own_s)) for _ in range(PERSISTENT)][-1] == expected


def test_beats_carry_it() -> None:
    beat = Beat(3, 7, "node", seconds=(0.25, 0.5))
    assert Beat.unpack(beat.pack().encode()) == beat


@pytest.mark.fault("a rank that dawdles in every step", "told of and recorded, with its host")
def test_a_rank_that_dawdles_is_named(tmp_path: Path, data: Path) -> None:
    script = tmp_path / "dawdler.py"
    script.write_text(DAWDLER)
    config = tiny_file(tmp_path, data, steps=9999, every_steps=0)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    found: list[dict] = []
    with start_ranks(tmp_path, [sys.executable, str(script), "train", str(config)]) as ranks:
        while not found:
            assert ranks.processes[0].poll() is None, ranks.said(0)
            time.sleep(0.1)
            lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
            found = [record for record in map(json.loads, lines) if record["kind"] == "slow_rank"]
    assert (found[0]["rank"], found[0]["host"]) == (1, os.uname().nodename)
    assert found[0]["own_s"] > 1.3 * found[0]["others_s"]
