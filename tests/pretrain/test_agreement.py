"""Ranks that run different things are told so before they train, in one line that names whom and what."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from headrace.errors import UserError
from headrace.parallel.mesh import World
from headrace.pretrain import agreement, source
from headrace.pretrain.agreement import check_agreement, check_same_data
from headrace.pretrain.config import Config
from headrace.pretrain.resume import Progress
from headrace.pretrain.run import leave_out_rows, skipped_rows_file
from headrace.pretrain.source import source_hash
from tiny import this_world, tiny_config


def refusal(configs: list[Config], sources: list[str], torches: list[str] | None = None) -> str:
    """What this rank is told when rank r has the r-th configuration, source and version of torch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "source_hash", lambda: sources[rank])
        if torches:
            patch.setattr(torch, "__version__", torches[rank])
        patch.setattr(agreement.platform, "node", lambda: f"node{rank // 2}")
        try:
            check_agreement(configs[rank], World(rank, size, torch.device("cpu")))
        except UserError as error:
            return str(error) if error.everywhere else "every rank would print its own"
    return ""


def test_the_same_everywhere_is_accepted(gloo: Callable, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    for size in (1, 2):
        assert gloo(size, refusal, [config] * size, ["a"] * size) == [""] * size


@pytest.mark.fault("another configuration on one rank", "refused; rank and keys named")
def test_another_configuration_is_named_by_rank_and_key(gloo: Callable, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    longer = tiny_config(tmp_path, tmp_path, "train.steps=7", "model.mamba2.d_state=16", "parallel.timeout_s=60")
    messages = gloo(3, refusal, [config, config, longer], ["a"] * 3)
    assert (
        messages
        == [
            "rank 2 (node1) runs another configuration: model.mamba2.d_state: 8 -> 16; train.steps: 6 -> 7; "
            "parallel.timeout_s: 600.0 -> 60.0; start all ranks with the same files and overrides"
        ]
        * 3
    )


def test_a_configuration_that_differs_in_much_is_cut_short(gloo: Callable, tmp_path: Path) -> None:
    changes = [f"train.{key}=8" for key in ("steps", "batch_rows", "micro_batch_rows", "nonfinite_limit")]
    changes += ["optimizer.lr=0.5", "schedule.warmup_steps=1", "run.seed=3", "run.name=x", "data.seq_len=64"]
    other = tiny_config(tmp_path, tmp_path, *changes)
    message = gloo(2, refusal, [tiny_config(tmp_path, tmp_path), other], ["a", "a"])[0]
    assert message.count(" -> ") == agreement.SHOWN
    assert "; and 1 more; start all ranks" in message


@pytest.mark.fault("other code on one rank", "refused; rank named")
def test_other_code_is_named_by_rank(gloo: Callable, tmp_path: Path) -> None:
    configs = [tiny_config(tmp_path, tmp_path)] * 4
    (message,) = set(gloo(4, refusal, configs, ["91bc", "91bc", "3f2a", "3f2a"]))
    assert message.startswith("ranks 2-3 (node1) run other code (headrace ")
    assert "source 3f2a instead of " in message
    (message,) = set(gloo(2, refusal, configs, ["a", "a"], ["2.13.0", "2.11.0"]))
    assert message.startswith("rank 1 (node0) runs other code (torch 2.11.0 instead of 2.13.0)")


def test_the_hash_covers_the_package_and_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_hash()
    started = time.process_time()
    source_hash()
    assert time.process_time() - started < 0.2
    for name, text in {"__init__.py": "", "a/__init__.py": "", "a/b/c.py": "x", "tests/t.py": "y"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "__file__", str(tmp_path / "a" / "source.py"))
    before = source_hash()
    (tmp_path / "tests" / "t.py").write_text("z")
    assert source_hash() == before
    (tmp_path / "a" / "b" / "c.py").write_text("z")
    assert source_hash() != before


def data_refusal(config: Config, fingerprints: list[str]) -> str:
    try:
        check_same_data(fingerprints[dist.get_rank()], config, this_world())
    except UserError as error:
        return str(error) if error.everywhere else "every rank would print its own"
    return ""


@pytest.mark.fault("other data on the disk of one machine", "refused; rank named")
def test_other_data_is_named_by_rank(gloo: Callable, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    assert gloo(2, data_refusal, config, ["a", "a"]) == [""] * 2
    (message, *others) = gloo(3, data_refusal, config, ["a", "b", "a"])
    assert others == [message] * 2
    assert message.startswith("rank 1 (")
    assert f"has other data in {tmp_path} than rank 0" in message


def rows_left_out(configs: list[Config]) -> tuple[list[list[int]], int]:
    progress = Progress(step=3, next_row=12)
    leave_out_rows(configs[dist.get_rank()], progress, this_world())
    return progress.skipped_rows, progress.next_row


@pytest.mark.fault("a shared folder of which a rank sees an older state", "all leave out the rows that rank 0 knows of")
def test_all_leave_out_the_same_rows(gloo: Callable, tmp_path: Path) -> None:
    here, there = (tiny_config(tmp_path, tmp_path, f"run.name={name}") for name in ("here", "there"))
    note = skipped_rows_file(here)
    note.parent.mkdir(parents=True)
    note.write_text("[[8, 16]]")
    assert gloo(2, rows_left_out, [here, there]) == [([[8, 16]], 16)] * 2
