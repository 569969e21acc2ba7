"""Copies in memory: where they lie, which a start chooses, and which ranks are peers."""

import re
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.pretrain import saver
from headrace.pretrain.memory import copies
from headrace.pretrain.memory.folder import copies_name, find_copies, open_run, place_of, remove_left
from headrace.pretrain.memory.plan import Holding, Moment, choose, peer_shift, why_not
from headrace.pretrain.metrics import _scalars
from tiny import tiny_config

NAME = "0123456789ab-89abcdef"


def test_a_folder_that_is_not_private_is_refused(tmp_path: Path) -> None:
    for name, make in {
        "open": lambda path: path.mkdir(mode=0o755),
        "link": lambda path: path.symlink_to(tmp_path),
        "file": Path.touch,
    }.items():
        make(tmp_path / name)
        with pytest.raises(UserError, match="is not a folder of this user that is closed"):
            open_run(tmp_path / name, NAME)
    made = open_run(tmp_path / "fine", NAME)
    assert made.parent.stat().st_mode & 0o777 == 0o700


def test_the_name_of_a_runs_copies(tmp_path: Path) -> None:
    """By its id and where it lies, under whatever name; no file `run_id` leads out of the folder."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    names = [copies_name("0123456789ab", tmp_path / name) for name in ("a", "link", "b")]
    assert names[0] == names[1] != names[2]
    assert open_run(tmp_path / "memory", copies_name("x" * 64, tmp_path)).is_dir()
    for run_id in ("", "../open", "a b", "x" * 65):
        with pytest.raises(UserError, match=re.escape(f"the run's id {run_id!r} (file run_id) must be")):
            open_run(tmp_path / "memory", copies_name(run_id, tmp_path))


def holding(seen_by: int, keeper: int, owner: int, step: int, misfit: str = "") -> Holding:
    return Holding(seen_by, keeper, owner, Moment(step, 1, 0), f"p{owner}", f"{keeper}/{owner}/{step}", "", misfit)


def test_what_is_chosen() -> None:
    pieces = ["p0", "p1"]
    own = [holding(0, 0, 0, 5), holding(1, 1, 1, 5)]
    plan = choose([holding(1, 1, 0, 5), *own, holding(0, 0, 0, 9)], pieces)
    assert plan is not None
    assert (plan.moment.step, plan.from_peers) == (5, [])
    moved = choose([holding(0, 1, 1, 5), holding(1, 0, 0, 5)], pieces)
    assert moved is not None
    assert [source.seen_by for source in moved.sources] == [1, 0]
    assert choose([holding(0, 0, 0, 5)], pieces) is None
    assert choose([holding(0, 0, 0, 5), holding(1, 1, 1, 5, "x")], pieces) is None
    assert choose(own, ["p0", "other"]) is None
    assert why_not([], pieces) == ""
    assert why_not(own, ["p0", "other"]) == "the copies in memory of step 5 are of another layout"
    again = [holding(0, 0, 0, 5), Holding(1, 1, 1, Moment(5, 2, 0), "p1", "", "")]
    assert choose(again, pieces) is None, "two starts made them"


@pytest.mark.parametrize(
    ("machines", "shift"),
    [("a", 0), ("aa", 1), ("ab", 1), ("aabb", 2), ("abab", 1), ("aaaabbbbcccc", 4), ("aaab", 1)],
)
def test_peers_are_on_other_machines(machines: str, shift: int) -> None:
    assert peer_shift(machines) == shift


def test_what_ranks_left_that_are_elsewhere_now(tmp_path: Path) -> None:
    """Older copies than all machines hold go; newer ones may be in use by a rank that shares the folder."""
    run_folder = open_run(tmp_path / "memory", NAME)
    for keeper, step in ((0, 3), (7, 3), (7, 5)):
        (place_of(run_folder, keeper, keeper) / f"step-{step:08d}").mkdir(parents=True)
    remove_left(run_folder, {0}, 5)
    left = [(keeper, owner, path.name) for keeper, owner, path in find_copies(run_folder)]
    assert left == [(0, 0, "step-00000003"), (7, 7, "step-00000005")]


def test_a_list_over_something_else_than_layers_is_no_scalar() -> None:
    assert _scalars({"kind": "memory_resume", "step": 3, "from_peers": [1, 2]}) == {}
    assert _scalars({"kind": "routing", "step": 3, "layers": [5], "entropy": [0.5]}) == {"routing/entropy/layer_5": 0.5}


def test_the_setting_is_checked(tmp_path: Path, data: Path) -> None:
    for override, part in {
        "checkpoint.memory_every_steps=-1": "must not be negative",
        "checkpoint.memory_every_steps=2": "must be below checkpoint.every_steps=2",
        "checkpoint.memory_folder=here": "must be an absolute path",
    }.items():
        with pytest.raises(UserError, match=part):
            tiny_config(tmp_path, data, override)
    assert tiny_config(tmp_path, data, "checkpoint.memory_every_steps=9", "checkpoint.every_steps=0")
    assert saver.CLOSE_S == copies.CLOSE_S
