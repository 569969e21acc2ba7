"""What a start is refused for where a run is there already: another process, configuration, code or data."""

import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.data import PrepareConfig, TokenizerConfig, prepare
from headrace.errors import UserError
from headrace.pretrain import source
from headrace.pretrain.config import Config
from headrace.pretrain.run_folder import open_run_folder
from headrace.pretrain.source import source_hashes
from tiny import tiny_config, train_or_refusal, train_tiny


@pytest.mark.fault("two jobs in one run folder", "the second is refused")
def test_a_run_folder_takes_one_process(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    holder = open_run_folder(config)
    for message in gloo(2, train_or_refusal, config):
        assert "is in use by process" in message
    holder.close()
    assert gloo(1, train_tiny, config) == [6]


@pytest.mark.fault("a run folder that everyone may write to", "refused")
def test_a_run_folder_of_everyone(tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    config.run.folder.mkdir()
    config.run.folder.chmod(0o777)
    with pytest.raises(UserError, match="may be written to by everyone; chmod o-w"):
        open_run_folder(config)
    config.run.folder.rmdir()
    before = os.umask(0)
    try:
        open_run_folder(config).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(config.run.folder.stat().st_mode) == 0o755


def test_a_look_at_a_run_refuses_no_start(tmp_path: Path, data: Path) -> None:
    """`headrace status` holds the lock for a moment."""
    config = tiny_config(tmp_path, data)
    config.run.folder.mkdir()
    with (config.run.folder / ".lock").open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        open_run_folder(config).close()


@pytest.mark.fault("another configuration at resume", "refused; the differences named")
@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.d_model=32", "model.d_model: 16 -> 32"),
        ("optimizer.lr=0.1", "optimizer.lr: 0.001 -> 0.1"),
        ("data.seq_len=16", "data.seq_len: 32 -> 16"),
        ("train.batch_rows=8", "train.batch_rows: 4 -> 8"),
        ("schedule.warmup_steps=1", "schedule.warmup_steps: 2 -> 1"),
        ("run.seed=2", "run.seed: 1 -> 2"),
    ],
)
def test_a_changed_run_is_not_resumed(gloo: Callable, tmp_path: Path, data: Path, override: str, part: str) -> None:
    gloo(1, train_tiny, tiny_config(tmp_path, data, "train.steps=2"))
    (message,) = gloo(1, train_or_refusal, tiny_config(tmp_path, data, override))
    assert part in message
    assert "choose another run.name" in message


def run_by_other_code(config: Config, changed: dict[str, str | None]) -> int | str:
    """As `train_or_refusal`, in a start whose code has other hashes in these files."""
    hashes = {**source_hashes(), **changed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "source_hashes", lambda: {name: text for name, text in hashes.items() if text})
        return train_or_refusal(config)


@pytest.mark.fault("other code at resume", "refused; the files named; goes on where that is wanted")
def test_other_code_does_not_go_on(gloo: Callable, tmp_path: Path, data: Path) -> None:
    gloo(2, train_tiny, tiny_config(tmp_path, data, "train.steps=2"))
    changed = {"model/lm.py": "0", "errors.py": None, "model/new.py": "1"}
    for message in gloo(2, run_by_other_code, tiny_config(tmp_path, data), changed):
        assert "(errors.py gone; model/lm.py changed; model/new.py new)" in message
        assert "checkpoint.other_code=true" in message
    many = {f"model/{number}.py": "1" for number in range(9)}
    assert "and 4 more files" in gloo(1, run_by_other_code, tiny_config(tmp_path, data), many)[0]
    finished = tiny_config(tmp_path, data, "train.steps=2")
    assert gloo(1, run_by_other_code, finished, changed) == [2]
    anyway = tiny_config(tmp_path, data, "checkpoint.other_code=true", "train.steps=4")
    assert gloo(1, run_by_other_code, anyway, changed) == [4]
    assert "errors.py new" in gloo(1, train_or_refusal, tiny_config(tmp_path, data))[0]


@pytest.mark.fault("other data at resume", "refused; what differs named")
def test_other_data_under_the_same_path_is_refused(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    gloo(1, train_tiny, config)
    moved = tmp_path / "data"
    tokenizer = TokenizerConfig(path=str(data / "tokenizer.model"))
    prepare(
        PrepareConfig(corpus=str(data.parent / "corpus"), out=str(moved), heldout_fraction=0.3, tokenizer=tokenizer)
    )
    changed = tiny_config(tmp_path, moved)
    (message,) = gloo(1, train_or_refusal, changed)
    assert "was trained on another data order (fingerprint:" in message
