"""Whole runs of a tiny model: resuming, changing the number of ranks, skipped updates, and what stops a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.data import Batch, PrepareConfig, TokenizerConfig, prepare
from headrace.errors import MachineError, UserError
from headrace.pretrain.build import check_compiler
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.engine import Engine
from headrace.pretrain.metrics import Metrics
from headrace.pretrain.trainer import train
from tiny import this_world, tiny_config, train_or_refusal, train_tiny, write_corpus

MEASURED = {"seconds", "tokens_per_s"}


def records(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["kind"] == kind]


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in records(config)]


def norms(config: Config) -> list[float]:
    """Unlike the losses after it, the norm tells when the gradient is scaled wrongly: the optimizers level that out."""
    return [record["grad_norm"] for record in records(config)]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_full(latest_checkpoint(config.run.folder / "checkpoints"))


def rewind(config: Config, to_step: int) -> None:
    """Leave the run folder as a process killed after `to_step`'s checkpoint, in the middle of a line, would."""
    for checkpoint in (config.run.folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > to_step:
            shutil.rmtree(checkpoint)
    with (config.run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st\xff')


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize(
    ("ranks", "layout", "others"), [(1, "parallel.cp=1", ["triton", "reference"]), (2, "parallel.cp=2", ["triton"])]
)
def test_kernels_train_as_pytorch_does(
    gloo: Callable, tmp_path: Path, data: Path, ranks: int, layout: str, others: list[str]
) -> None:
    curves = {}
    for kernels in ["torch", *others]:
        choice = (layout, f"train.kernels={kernels}", f"run.name={kernels}", "train.steps=2", "train.batch_rows=2")
        config = tiny_config(tmp_path, data, *choice)
        assert gloo(ranks, train_tiny, config, timeout_s=200) == [2] * ranks
        curves[kernels] = losses(config) + norms(config)
        assert [start["kernels"] for start in records(config, "start")] == [kernels]
    for kernels in others:
        assert curves[kernels] == pytest.approx(curves["torch"], rel=1e-5)


def test_kernels_that_cannot_run_are_refused(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "train.kernels=triton", "train.precision=bfloat16")
    (message,) = gloo(1, train_or_refusal, config)
    assert message.startswith("train.kernels=triton: Triton cannot run: ")
    assert not (config.run.folder / "checkpoints").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(gloo: Callable, tmp_path: Path, data: Path, ranks: int) -> None:
    config = tiny_config(tmp_path, data, "eval.every_steps=3")
    assert gloo(ranks, train_tiny, config) == [6] * ranks
    whole, whole_weights = records(config), weights(config)
    evaluations = records(config, "eval")
    assert [e["step"] for e in evaluations] == [3, 6]
    rewind(config, 2)
    gloo(ranks, train_tiny, config)
    assert records(config) == whole
    assert records(config, "eval") == evaluations
    again = weights(config)
    assert again.keys() == whole_weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole_weights.items())


def test_a_stopped_run_goes_on_as_if_it_had_not(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """It stops where neither a save nor a line is due."""
    periods = ("checkpoint.every_steps=4", "log.every_steps=2", "eval.every_steps=2")
    whole = tiny_config(tmp_path, data, "run.name=whole", *periods)
    gloo(2, train_tiny, whole)
    config = tiny_config(tmp_path, data, *periods)
    assert gloo(2, train_tiny, config, 3) == [3, 3]
    assert latest_checkpoint(config.run.folder / "checkpoints").name == "step-00000003"
    assert gloo(2, train_tiny, config, 2) == [3, 3]
    assert gloo(2, train_tiny, config) == [6, 6]
    assert records(config) == records(whole)
    assert records(config, "eval") == records(whole, "eval")
    again, expected = weights(config), weights(whole)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_another_number_of_ranks_goes_on_with_the_same_data(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    gloo(1, train_tiny, config)
    expected = losses(config)
    for ranks in (2, 4):
        rewind(config, 2)
        gloo(ranks, train_tiny, config)
        assert losses(config)[:2] == expected[:2]
        assert losses(config)[2:] == pytest.approx(expected[2:], rel=1e-5)
        assert [r["tokens"] for r in records(config)] == sorted({r["tokens"] for r in records(config)})


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.micro_batch_rows=1",),
        ("train.recompute=full",),
        ("train.recompute=selective",),
        ("parallel.dp_replicate=2",),
        ("parallel.reshard_after_forward=false",),
    ],
    ids=lambda o: o[0],
)
def test_how_a_step_is_computed_does_not_change_it(
    gloo: Callable, tmp_path: Path, data: Path, overrides: tuple[str, ...]
) -> None:
    expected = tiny_config(tmp_path, data, "run.name=expected", "train.steps=3")
    gloo(1, train_tiny, expected)
    config = tiny_config(tmp_path, data, "train.steps=3", *overrides)
    gloo(2, train_tiny, config)
    assert losses(config) == pytest.approx(losses(expected), rel=1e-5)
    assert norms(config) == pytest.approx(norms(expected), rel=1e-4)


def test_bfloat16_is_close_to_float32(gloo: Callable, tmp_path: Path, data: Path) -> None:
    expected = tiny_config(tmp_path, data, "run.name=expected", "train.precision=float32")
    config = tiny_config(tmp_path, data, "train.precision=bfloat16")
    gloo(1, train_tiny, expected)
    gloo(2, train_tiny, config)
    assert losses(config) != losses(expected)
    assert losses(config) == pytest.approx(losses(expected), rel=2e-2)


def test_training_learns(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "train.steps=40", "checkpoint.every_steps=0", "optimizer.lr=0.01")
    gloo(1, train_tiny, config)
    assert losses(config)[-1] < losses(config)[0] - 1.5


def run_with_nan(config: Config, bad_steps: set[int]) -> tuple[int, int] | str:
    """Train while the loss and a gradient of some updates are NaN on the last rank only."""
    original = Engine.forward_backward
    calls = 0

    def poisoned(engine: Engine, batch: Batch) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        result = original(engine, batch)
        if calls in bad_steps and dist.get_rank() == dist.get_world_size() - 1:
            next(iter(engine.named_parameters().values())).grad.to_local().fill_(float("nan"))
            result[0].fill_(float("nan"))
        return result

    Engine.forward_backward = poisoned
    try:
        progress = train(config, this_world())
    except UserError as error:
        return str(error) if error.everywhere else "every rank would print its own"
    finally:
        Engine.forward_backward = original
    return progress.step, progress.skipped


@pytest.mark.fault("NaN in a gradient", "the update is skipped on all ranks, and counted")
def test_non_finite_updates_are_skipped_on_all_ranks_and_counted(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    assert gloo(2, run_with_nan, config, {3, 5}) == [(6, 2), (6, 2)]
    assert [r["skipped"] for r in records(config)] == [0, 0, 1, 1, 2, 2]
    for key in ("grad_norm", "loss"):
        assert [r[key] is None for r in records(config)] == [False, False, True, False, True, False]
    assert all(tensor.isfinite().all() for tensor in weights(config).values())


def test_skipped_updates_between_lines_are_counted_over_a_restart(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "log.every_steps=4")
    gloo(1, run_with_nan, config, {1})
    whole = records(config)
    assert [(r["step"], r["skipped"]) for r in whole] == [(4, 1), (6, 1)]
    rewind(config, 2)
    gloo(1, train_tiny, config)
    assert records(config) == whole


def test_speed_is_that_of_all_updates_since_the_line_before(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "log.every_steps=4")
    gloo(1, train_tiny, config)
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    tokens = 0
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["tokens_per_s"] * line["seconds"] == pytest.approx(line["tokens"] - tokens)
        tokens = line["tokens"]


@pytest.mark.fault("NaN in every gradient", "the run ends in one line; the checkpoint before is whole")
def test_a_run_that_stays_non_finite_stops(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "train.nonfinite_limit=3")
    for message in gloo(2, run_with_nan, config, {2, 3, 4, 5, 6}):
        assert "3 updates in a row up to step 4" in message
    assert latest_checkpoint(config.run.folder / "checkpoints").name == "step-00000002"


def test_a_longer_run_goes_on(gloo: Callable, tmp_path: Path, data: Path) -> None:
    gloo(1, train_tiny, tiny_config(tmp_path, data, "train.steps=2"))
    config = tiny_config(tmp_path, data, "train.steps=5")
    assert gloo(1, train_tiny, config) == [5]
    assert [r["step"] for r in records(config)] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_left_alone(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    gloo(1, train_tiny, config)
    before = (config.run.folder / "metrics.jsonl").read_bytes()
    assert gloo(1, train_tiny, config) == [6]
    assert (config.run.folder / "metrics.jsonl").read_bytes() == before


def test_data_and_runs_may_be_moved(gloo: Callable, tmp_path: Path, data: Path) -> None:
    first = tiny_config(tmp_path, data, "train.steps=2")
    gloo(1, train_tiny, first)
    first.run.folder.rename(tmp_path / "moved")
    config = tiny_config(tmp_path, shutil.copytree(data, tmp_path / "data"), "run.name=moved")
    assert gloo(1, train_tiny, config) == [6]
    assert [r["step"] for r in records(config)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no second file system here")
def test_checkpoints_may_lie_on_another_file_system(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "checkpoint.keep_last=1")
    config.run.folder.mkdir(parents=True)
    with TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (config.run.folder / "checkpoints").symlink_to(elsewhere)
        gloo(2, train_tiny, tiny_config(tmp_path, data, "checkpoint.keep_last=1", "train.steps=4"))
        assert gloo(2, train_tiny, config) == [6, 6]
        assert [path.name for path in Path(elsewhere).iterdir()] == ["step-00000006"]
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4, 5, 6]


def test_what_evaluates_nothing_needs_no_heldout_text(gloo: Callable, tmp_path: Path) -> None:
    corpus, tokenizer = write_corpus(tmp_path / "corpus", 10), TokenizerConfig(vocab_size=320)
    prepare(PrepareConfig(corpus=str(corpus), out=str(tmp_path / "data"), heldout_fraction=0.0, tokenizer=tokenizer))
    assert gloo(1, train_tiny, tiny_config(tmp_path, tmp_path / "data")) == [6]
    message = gloo(1, train_or_refusal, tiny_config(tmp_path, tmp_path / "data", "eval.every_steps=2"))[0]
    assert "has no heldout documents" in message


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.model", ".config.toml.tmp"])
def test_what_cannot_be_written_stops_all_ranks(gloo: Callable, tmp_path: Path, data: Path, name: str) -> None:
    config = tiny_config(tmp_path, data, "checkpoint.retries=0")
    (config.run.folder / name).mkdir(parents=True)
    for message in gloo(2, train_or_refusal, config):
        assert str(config.run.folder) in message


def test_a_full_disk_is_the_machines_failing(tmp_path: Path, data: Path) -> None:
    metrics = Metrics(tiny_config(tmp_path, data), Path("/dev/full"))
    with pytest.raises(MachineError, match="/dev/full cannot be written: No space left on device"):
        metrics.start(0, 0, "torch", {"name": "AdamW", "state_bytes_per_parameter": 8.0})
    metrics.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_compute_the_same(gloo: Callable, tmp_path: Path, data: Path) -> None:
    changes = ("train.steps=2", "eval.every_steps=1", "eval.window=24", "train.recompute=selective")
    expected = tiny_config(tmp_path, data, "run.name=expected", *changes)
    config = tiny_config(tmp_path, data, "train.compile=true", *changes)
    gloo(1, train_tiny, expected)
    gloo(1, train_tiny, config, timeout_s=200)
    assert losses(config) == pytest.approx(losses(expected), rel=1e-5)
    scores = [[r["loss"] for r in records(c, "eval")] for c in (config, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler"):
        check_compiler()


def test_a_vocabulary_too_small_for_the_data_is_refused(gloo: Callable, tmp_path: Path, data: Path) -> None:
    for message in gloo(2, train_or_refusal, tiny_config(tmp_path, data, "model.vocab_size=300")):
        assert "model.vocab_size=300 is below the 320 pieces" in message
    assert not (tmp_path / "tiny").exists()


def test_the_record_of_a_run(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "run.seed=5")
    gloo(2, train_tiny, config)
    record = json.loads((config.run.folder / "manifest.json").read_text())
    assert record["seed"] == 5
    assert record["layout"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    assert record["packages"]["torch"] == torch.__version__
    assert record["data"]["fingerprint"]
    assert (config.run.folder / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
