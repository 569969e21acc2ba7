"""What is asked of a run while it goes: stop, save, evaluate, by files and signals, agreed on by all ranks."""

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from headrace.errors import MachineError
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.control import Control, Wish
from headrace.pretrain.run import checkpoints
from headrace.pretrain.saver import Saver
from headrace.pretrain.trainer import train
from tiny import losses, records, this_world, tiny_config


def run(config: Config, kicked: int | None = None, number: int = signal.SIGUSR1) -> int:
    """The step a run ends at; rank `kicked` gets a signal as soon as it listens."""
    enter = Control.__enter__

    def enter_and_kick(self: Control) -> Control:
        enter(self)
        if dist.get_rank() == kicked:
            os.kill(os.getpid(), number)
        return self

    world = this_world()
    signal.signal(number, signal.SIG_DFL)  # tests under nohup ignore one
    with mock.patch.object(Control, "__enter__", enter_and_kick):
        step = train(config, world).step
    assert signal.getsignal(number) is signal.SIG_DFL
    return step


def ask(config: Config, *names: str) -> None:
    config.run.folder.mkdir(exist_ok=True)
    for name in names:
        (config.run.folder / name).touch()


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_file_stop(gloo: Callable, tmp_path: Path, data: Path, ranks: int) -> None:
    names = ("train.batch_rows=6", "checkpoint.every_steps=5")
    whole, config = (tiny_config(tmp_path, data, *names, f"run.name={name}") for name in ("whole", "asked"))
    assert gloo(ranks, run, whole) == [6] * ranks
    ask(config, "STOP")
    steps = gloo(ranks, run, config)
    assert steps == [1 if ranks == 1 else 2] * ranks  # alone nothing need be agreed on
    assert json.loads((config.run.folder / "STOPPED").read_text()) == {"step": steps[0], "reason": "the file STOP"}
    assert records(config, "stop") == [{"kind": "stop", "step": steps[0], "reason": "the file STOP"}]
    assert latest_checkpoint(checkpoints(config)).name == f"step-{steps[0]:08}"
    assert gloo(ranks, run, config) == [6] * ranks
    assert not (config.run.folder / "STOPPED").exists()
    assert not (config.run.folder / "STOP").exists()
    assert losses(config) == losses(whole)


def stop_on_a_full_disk(config: Config) -> str:
    """What ends a run that is to stop, and cannot save."""
    full = mock.patch.object(Saver, "save", side_effect=MachineError("no space left on device", everywhere=True))
    with full, pytest.raises(MachineError) as caught:
        train(config, this_world())
    return str(caught.value)


def test_a_stop_that_fails_is_not_forgotten(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """The next start, which a launcher makes by itself, stops as well."""
    config = tiny_config(tmp_path, data, "checkpoint.every_steps=0")
    ask(config, "STOP")
    assert gloo(2, stop_on_a_full_disk, config) == ["no space left on device"] * 2
    assert not (config.run.folder / "STOPPED").exists()
    assert gloo(2, run, config) == [2, 2]
    assert (config.run.folder / "STOPPED").exists()
    assert not (config.run.folder / "STOP").exists()


@pytest.mark.fault("SIGTERM, SIGUSR1, SIGHUP to a rank", "saved and stopped; the same bits")
@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_to_any_rank(gloo: Callable, tmp_path: Path, data: Path, number: int, reason: str) -> None:
    config = tiny_config(tmp_path, data)
    assert gloo(2, run, config, 1, number) == [2, 2]
    assert json.loads((config.run.folder / "STOPPED").read_text())["reason"] == reason
    assert latest_checkpoint(checkpoints(config)).name == "step-00000002"


def test_save_and_evaluate_now(gloo: Callable, tmp_path: Path, data: Path) -> None:
    names = ("checkpoint.every_steps=0", "eval.every_steps=6", "eval.window=32", "eval.max_tokens=100")
    config = tiny_config(tmp_path, data, *names)
    ask(config, "CHECKPOINT_NOW", "EVAL_NOW")
    assert gloo(2, run, config) == [6, 6]
    assert [record["step"] for record in records(config, "eval")] == [2, 6]
    assert [path.name for path in sorted(checkpoints(config).glob("step-*"))] == ["step-00000002", "step-00000006"]
    assert not (config.run.folder / "CHECKPOINT_NOW").exists()


def test_profile(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """The next steps are traced on the first rank, once, and no bit of the run changes."""
    names = ("log.profile_steps=2", "checkpoint.every_steps=0")
    whole, config = (tiny_config(tmp_path, data, *names, f"run.name={name}") for name in ("whole", "traced"))
    ask(config, "PROFILE")
    assert gloo(2, run, whole) == gloo(2, run, config) == [6, 6]
    folder = config.run.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3.json.gz", "step-3.txt"]
    trace = json.loads(gzip.decompress((folder / "step-3.json.gz").read_bytes()))
    names_of = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names_of) == 2  # torch's AdamW, once a step
    assert "aten::" in (folder / "step-3.txt").read_text()
    assert not (config.run.folder / "PROFILE").exists()
    assert not (whole.run.folder / "profile").exists()
    assert losses(config) == losses(whole)
    expected, again = (load_full(latest_checkpoint(checkpoints(c))) for c in (whole, config))
    assert all(again[name].equal(tensor) for name, tensor in expected.items())


def test_a_run_that_ends_while_it_is_traced(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "log.profile_steps=99", "train.steps=3")
    ask(config, "PROFILE")
    assert gloo(1, run, config) == [3]
    assert (config.run.folder / "profile" / "step-2.txt").exists()


class Late(list[Wish]):
    """A signal comes just when the last of what was heard is taken."""

    came = False

    def pop(self, *_: int) -> Wish:  # type: ignore[override]
        found = super().pop()
        if not self and not self.came:
            self.came = True
            self.append(Wish.SIGTERM)
        return found


def hear_late() -> list[Wish]:
    control = Control(None)
    control._heard = Late([Wish.SAVE, Wish.EVALUATE])
    return [control.agreed() for _ in range(3)]


def test_a_signal_is_never_lost(gloo: Callable) -> None:
    """Whichever moment it comes at."""
    everything = Wish(0)
    for wish in gloo(1, hear_late)[0]:
        everything |= wish
    assert everything == Wish.SAVE | Wish.EVALUATE | Wish.SIGTERM
