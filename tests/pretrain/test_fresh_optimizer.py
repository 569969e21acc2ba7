"""A run whose optimizer was changed between save and resume: refused with the way on, or begun anew where allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.run import checkpoints
from tiny import tiny_config, train_or_refusal

EIGHT = ("optimizer.kind=adamw", "optimizer.state_bits=8", "optimizer.block_size=16", "optimizer.min_8bit_size=0")
FRESH = "checkpoint.fresh_optimizer=true"


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ((), EIGHT, "optimizer.state_bits: 32 -> 8"),
        (EIGHT, (*EIGHT, "optimizer.block_size=32"), "optimizer.block_size: 16 -> 32"),
    ],
    ids=["other optimizer", "other blocks"],
)
def test_another_optimizer(
    gloo: Callable, tmp_path: Path, data: Path, before: tuple[str, ...], after: tuple[str, ...], change: str
) -> None:
    config = tiny_config(tmp_path, data, *before)
    assert gloo(1, train_or_refusal, config, 2) == [2]
    saved = latest_checkpoint(checkpoints(config))
    (refused,) = gloo(1, train_or_refusal, tiny_config(tmp_path, data, *after), 4)
    assert change in refused
    assert FRESH in refused
    assert latest_checkpoint(checkpoints(config)) == saved
    assert gloo(1, train_or_refusal, tiny_config(tmp_path, data, *after, FRESH), 4) == [4]
    # From here on the new optimizer's state is there, and the flag changes nothing.
    before_last = load_full(latest_checkpoint(checkpoints(config)))
    assert gloo(1, train_or_refusal, tiny_config(tmp_path, data, *after, FRESH), 6) == [6]
    last = load_full(latest_checkpoint(checkpoints(config)))
    steps = {name for name in last if name.startswith("optim.step.")}
    assert {float(before_last[name]) for name in steps} == {2.0}
    assert {float(last[name]) for name in steps} == {4.0}


def test_a_checkpoint_from_elsewhere(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """The configuration beside it does not tell: the checkpoint does."""
    config = tiny_config(tmp_path, data, *EIGHT)
    assert gloo(1, train_or_refusal, config, 2) == [2]
    other = tiny_config(tmp_path, data, *EIGHT, "optimizer.block_size=32", "run.name=other")
    checkpoints(other).mkdir(parents=True)
    path = latest_checkpoint(checkpoints(config))
    (checkpoints(other) / path.name).symlink_to(path)
    (refused,) = gloo(1, train_or_refusal, other, 4)
    assert "holds the state of another optimizer (block_size: 16 -> 32)" in refused
    assert FRESH in refused


def test_other_code_is_refused_under_the_flag_too(tmp_path: Path, data: Path, gloo: Callable) -> None:
    config = tiny_config(tmp_path, data)
    assert gloo(1, train_or_refusal, config, 2) == [2]
    record = config.run.folder / "source.json"
    record.write_text(record.read_text().replace('"model/lm.py": "', '"model/lm.py": "0'))
    other = tiny_config(tmp_path, data, FRESH, "optimizer.lr=0.5")
    (refused,) = gloo(1, train_or_refusal, other, 4)
    assert "model/lm.py changed" in refused
