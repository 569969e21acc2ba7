"""Spikes of the loss: skipped, and when they last, the run goes back and leaves their rows out, the same each time."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from headrace.data import Batch, SkippedRows, TokenRows
from headrace.errors import UserError
from headrace.pretrain.checkpoint import latest_checkpoint, load_full, read_extra
from headrace.pretrain.config import Config
from headrace.pretrain.engine import Engine
from headrace.pretrain.run import checkpoints
from headrace.pretrain.spikes import SpikeGuard, SpikesConfig
from headrace.pretrain.trainer import train
from ranks import start_ranks
from tiny import records, this_world, tiny_config, tiny_file

# Three batches of four rows are trained on before the first spike, in the fourth step.
ON = ("spikes.deviations=20", "spikes.window=3", "spikes.patience=2", "train.steps=8")
BAD = (12, 20)


class KilledError(Exception):
    """As good as kill -9 to a test: nothing is saved."""


def run(config: Config, bad: tuple[int, int], factor: float, dies_at: int | None = None, calls: int = 0) -> int:
    """The step a run ends at; losses and gradients of the `bad` rows are multiplied, and call `calls` dies."""
    forward_backward = Engine.forward_backward
    made = 0

    def worse(self: Engine, batch: Batch) -> tuple[torch.Tensor, int]:
        nonlocal made
        made += 1
        if made == dies_at:
            raise KilledError
        loss_sum, targets = forward_backward(self, batch)
        if bad[0] <= batch.first_row < bad[1]:
            loss_sum = loss_sum * factor
            for parameter in self.named_parameters().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return loss_sum, targets

    with mock.patch.object(Engine, "forward_backward", worse):
        try:
            return train(config, this_world()).step
        except KilledError:
            return -1


def run_expecting_refusal(config: Config, bad: tuple[int, int], factor: float) -> str:
    with pytest.raises(UserError) as caught:
        run(config, bad, factor)
    assert caught.value.everywhere
    return str(caught.value)


def run_without_rows(config: Config, first: int, end: int) -> int:
    """The step a run ends at whose data never had the rows [first, end)."""
    row = TokenRows.row
    with mock.patch.object(TokenRows, "row", lambda self, k: row(self, k if k < first else k + end - first)):
        return run(config, (0, 0), 1.0)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_full(latest_checkpoint(checkpoints(config)))


def check_same(mine: Config, theirs: Config) -> None:
    found, expected = weights(mine), weights(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [r["loss"] for r in records(mine, "train")] == [r["loss"] for r in records(theirs, "train")]


LOW_RANK = ("optimizer.kind=low_rank", "optimizer.low_rank.rank=4", "optimizer.low_rank.refresh_steps=3")


@pytest.mark.fault(
    "losses x100 or NaN that last, with `spikes.deviations`",
    "goes back; the bits of a run whose data never had these rows",
)
@pytest.mark.parametrize(
    ("factor", "more"), [(100.0, ()), (float("nan"), LOW_RANK)], ids=["x100", "nan, with a clock of its own"]
)
def test_a_lasting_spike_is_as_if_its_rows_were_not(
    gloo: Callable, tmp_path: Path, data: Path, factor: float, more: tuple[str, ...]
) -> None:
    """The checkpoint before it is that of step 2, so rows 8 to 19 are left out."""
    config = tiny_config(tmp_path, data, *ON, *more, "run.name=spiked")
    assert gloo(2, run, config, BAD, factor) == [8, 8]
    never = tiny_config(tmp_path, data, *ON, *more, "run.name=never")
    assert gloo(2, run_without_rows, never, 8, 20) == [8, 8]
    check_same(config, never)
    (rewind,) = records(config, "rewind")
    assert (rewind["step"], rewind["spike"], rewind["rows"], rewind["rewinds"]) == (2, [4, 5], [8, 20], 1)
    assert [record["step"] for record in records(config, "train")] == list(range(1, 9))
    progress = read_extra(latest_checkpoint(checkpoints(config)))["progress"]
    assert progress["skipped_rows"] == [[8, 20]]
    assert progress["next_row"] == 8 * 4 + 12
    assert progress["skipped"] == 0


@pytest.mark.fault("killed within a spike, or after going back", "the same bits as not killed")
@pytest.mark.parametrize("call", [5, 7, 8], ids=["in the spike", "after the rewind", "later"])
def test_killed_in_between_it_comes_to_the_same(gloo: Callable, tmp_path: Path, data: Path, call: int) -> None:
    """Call 6 is the step in which the host learns that the spike has lasted; step 4, within it, is saved."""
    config, whole = (tiny_config(tmp_path, data, *ON, f"run.name={name}") for name in ("killed", "whole"))
    assert gloo(2, run, whole, BAD, 100.0) == [8, 8]
    assert gloo(2, run, config, BAD, 100.0, call) == [-1, -1]
    assert gloo(2, run, config, BAD, 100.0) == [8, 8]
    check_same(config, whole)
    assert records(config, "rewind") == records(whole, "rewind")


def test_rows_left_out_stay_out_without_a_checkpoint_that_knows(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """After the rewind it is killed; the rows are good the next time, and are left out all the same."""
    config, whole = (tiny_config(tmp_path, data, *ON, f"run.name={name}") for name in ("killed", "whole"))
    assert gloo(1, run, whole, BAD, 100.0) == [8]
    assert gloo(1, run, config, BAD, 100.0, 7) == [-1]
    assert gloo(1, run, config, (0, 0), 1.0) == [8]
    check_same(config, whole)


@pytest.mark.fault("one loss x100, with `spikes.deviations`", "its update is skipped on all ranks, and recorded")
def test_a_short_spike_is_skipped(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, *ON)
    assert gloo(2, run, config, (12, 16), 100.0) == [8, 8]
    (spike,) = records(config, "spike")
    assert (spike["step"], spike["in_a_row"]) == (4, 1)
    assert spike["loss"] > 50 * spike["limit"]
    assert not records(config, "rewind")
    assert records(config, "train")[-1]["skipped"] == 1


@pytest.mark.fault("a spike that comes again after going back", "the run ends in one line")
@pytest.mark.parametrize(
    ("bad", "limit", "reason"),
    [((12, 999), 1, "gone back 1 times already (spikes.rewinds_limit=1)"), ((4, 99), 9, "no checkpoint from before")],
)
def test_it_does_not_go_back_for_ever(
    gloo: Callable, tmp_path: Path, data: Path, bad: tuple[int, int], limit: int, reason: str
) -> None:
    config = tiny_config(tmp_path, data, *ON, f"spikes.rewinds_limit={limit}")
    (message,) = gloo(1, run_expecting_refusal, config, bad, float("nan"))
    assert reason in message


def judge_alone(config: SpikesConfig, losses: list[float], reload_at: int) -> list[int]:
    """Spikes in a row after each loss, by a guard that is saved and loaded in between."""
    guard = SpikeGuard(config, torch.device("cpu"))
    found = []
    for step, loss in enumerate(losses):
        if step == reload_at:
            state = json.loads(json.dumps(guard.state(), allow_nan=False))
            guard = SpikeGuard(config, torch.device("cpu"))
            guard.load(state)
        skip = guard.judge(torch.tensor(2 * loss), 2, torch.tensor(1.0), step, 4 * step)
        told = guard.take(settle=True)
        found.append(told[0].in_a_row if told else 0)
        assert bool(skip) == bool(told)
    return found


@pytest.mark.parametrize("reload_at", [0, 4, 6])
def test_what_a_spike_is(gloo: Callable, reload_at: int) -> None:
    """The median of 3, 4, 5 is 4, their median deviation 1: 7 is no spike and 7.1 is one, which then does not count."""
    config = SpikesConfig(deviations=3.0, window=3)
    losses = [900.0, 3.0, float("inf"), 4.0, 5.0, 7.1, float("nan"), 7.0, 5.0, 11.0]
    assert gloo(1, judge_alone, config, [*losses[1:], 7.0], reload_at) == [[0, 1, 0, 0, 1, 2, 0, 0, 1, 2]]


def test_stretches_add_up() -> None:
    skipped = SkippedRows().and_also(8, 20).and_also(20, 24).and_also(40, 44)
    assert [skipped.following(row) for row in (0, 7, 8, 12, 20, 24, 40)] == [0, 7, 24, 24, 24, 24, 44]
    assert skipped.continues(SkippedRows.read([[8, 20]]))
    assert not skipped.continues(SkippedRows.read([[8, 24]]))
    with pytest.raises(UserError):
        SkippedRows.read([[8]])


# From step 4 on, the loss and gradients of a batch times 100, then NaN, by rows; or a run whose data never had them.
HARMED = """
import sys
from headrace.data import TokenRows
from headrace.launch.cli import main
from headrace.pretrain.engine import Engine
before, row = Engine.forward_backward, TokenRows.row
def forward_backward(self, batch):
    loss_sum, targets = before(self, batch)
    factor = 100.0 if 12 <= batch.first_row < 16 else float("nan") if 16 <= batch.first_row < 20 else 1.0
    for parameter in self.named_parameters().values():
        parameter.grad.mul_(factor)
    return loss_sum * factor, targets
if sys.argv.pop(1) == "spiked":
    Engine.forward_backward = forward_backward
else:
    TokenRows.row = lambda self, k: row(self, k if k < 8 else k + 12)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault(
    "a loss x100 and then NaN, by `headrace train` in two processes",
    "goes back; the bits of a run whose data never had these rows",
)
def test_from_the_command_line(tmp_path: Path, data: Path) -> None:
    script = tmp_path / "harmed.py"
    script.write_text(HARMED)
    config = str(tiny_file(tmp_path, data))
    for name in ("spiked", "never"):
        command = [sys.executable, str(script), name, "train", config, *ON, f"run.name={name}"]
        with start_ranks(tmp_path, command) as ranks:
            assert ranks.statuses([0, 1], 200) == [0, 0], ranks.said(0)
    mine, theirs = (tiny_config(tmp_path, data, *ON, f"run.name={name}") for name in ("spiked", "never"))
    check_same(mine, theirs)
    (rewind,) = records(mine, "rewind")
    assert (rewind["spike"], rewind["rows"]) == ([4, 5], [8, 20])
    assert rewind["losses"][0] > 50 * rewind["limit"]
    assert rewind["losses"][1] is None
