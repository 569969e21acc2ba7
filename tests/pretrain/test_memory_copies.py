"""Copies of the state in memory: a start after a crash goes on from them with the same bits, or from the disk."""

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gloo_pool import WorkerError
from headrace.data import Batch
from headrace.errors import UserError
from headrace.parallel.mesh import World
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.engine import Engine
from headrace.pretrain.memory import copies, copy_file, exchange
from headrace.pretrain.memory.folder import copies_name, open_run
from headrace.pretrain.trainer import train
from tiny import records, tiny_config

BAD = (12, 20)


class KilledError(Exception):
    """As good as kill -9 to a test: nothing is saved."""


def run(
    config: Config,
    dies_at: int = 0,
    hard: bool = False,
    bad: tuple[int, int] = (0, 0),
    fails: tuple[str, int] = ("", 0),
    shared: bool = False,
) -> tuple[int, list[str]]:
    """The step a run ends at (-1: killed, -2: refused) and the warnings of this rank.

    Args:
        config: of the run.
        dies_at: the call of forward and backward in which all ranks are killed.
        hard: by SIGKILL.
        bad: rows whose losses and gradients are a hundred times as large.
        fails: `write` or `receive`, for which there is no room on the last rank at a step.
        shared: all ranks are on one machine, and not each on its own.
    """
    rank, forward_backward, made = dist.get_rank(), Engine.forward_backward, 0

    def worse(self: Engine, batch: Batch) -> tuple[torch.Tensor, int]:
        nonlocal made
        made += 1
        if made == dies_at and hard:
            os.kill(os.getpid(), signal.SIGKILL)
        if made == dies_at:
            raise KilledError
        loss_sum, targets = forward_backward(self, batch)
        if bad[0] <= batch.first_row < bad[1]:
            loss_sum = loss_sum * 100
            for parameter in self.named_parameters().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(100)
        return loss_sum, targets

    def full(folder: Path, num_bytes: int) -> None:
        if folder.name == f".tmp-step-{fails[1]:08d}" and rank == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("headrace.pretrain")
    logger.addHandler(handler)
    with ExitStack() as stack:
        if not shared:
            machine = mock.patch.object(copies, "open_run", lambda f, run: open_run(f / f"machine-{rank}", run))
            stack.enter_context(machine)
        stack.enter_context(mock.patch.object(Engine, "forward_backward", worse))
        if fails[0]:
            module = {"write": copy_file, "receive": exchange}[fails[0]]
            stack.enter_context(mock.patch.object(module, "check_room", full))
        try:
            return train(config, World(rank, dist.get_world_size(), torch.device("cpu"))).step, said
        except KilledError:
            return -1, said
        except UserError as error:
            return -2, [str(error)]
        finally:
            logger.removeHandler(handler)


def configured(folder: Path, data: Path, *overrides: str) -> Config:
    """Checkpoints of steps 4 and 8, copies of all others; six rows go to two and three ranks alike."""
    names = ("train.steps=8", "train.batch_rows=6", "checkpoint.every_steps=4", "checkpoint.memory_every_steps=1")
    where = f"checkpoint.memory_folder={folder / 'memory'}"
    return tiny_config(folder, data, *names, where, "checkpoint.asynchronous=false", *overrides)


def resumed(config: Config) -> list[tuple[int, list[int]]]:
    return [(record["step"], record["from_peers"]) for record in records(config, "memory_resume")]


def began(config: Config) -> list[int]:
    """Where each start of the run went on, by the record that is never cut."""
    lines = map(json.loads, (config.run.folder / "starts.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "resume"]


def files(config: Config) -> list[str]:
    root = Path(config.checkpoint.memory_folder)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def kept(config: Config, machine: int, owner: int, step: int) -> Path:
    (path,) = Path(config.checkpoint.memory_folder).glob(
        f"machine-{machine}/*/rank-{machine:05d}/of-rank-{owner:05d}/step-{step:08d}"
    )
    return path


def check_same(mine: Config, theirs: Config) -> None:
    found, expected = (load_full(latest_checkpoint(c.run.folder / "checkpoints")) for c in (mine, theirs))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [r["loss"] for r in records(mine, "train")] == [r["loss"] for r in records(theirs, "train")]
    assert [r["step"] for r in records(mine, "train")] == list(range(1, 9))


@pytest.fixture(scope="module")
def whole(gloo: Callable, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Config:
    """A run of three ranks that nothing happened to, and without copies."""
    config = configured(tmp_path_factory.mktemp("whole"), data, "checkpoint.memory_every_steps=0")
    assert gloo(3, run, config) == [(8, [])] * 3
    assert files(config) == []
    return config


@pytest.fixture(scope="module")
def crashed(gloo: Callable, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Config:
    """A run of three ranks that died in step 7: copies of steps 5 and 6, a checkpoint of step 4."""
    config = configured(tmp_path_factory.mktemp("crashed"), data)
    assert gloo(3, run, config, 7) == [(-1, [])] * 3
    assert len(files(config)) == 3 * 2 * 2 * 2  # ranks, theirs and a peer's, steps, files
    return config


def copy_of(crashed: Config, folder: Path, data: Path, *overrides: str) -> Config:
    shutil.copytree(crashed.run.folder, folder / "tiny")
    shutil.copytree(crashed.checkpoint.memory_folder, folder / "memory")
    config = configured(folder, data, *overrides)
    for path in (folder / "memory").glob("machine-*/*"):
        path.rename(path.with_name(copies_name((folder / "tiny" / "run_id").read_text().strip(), config.run.folder)))
    return config


OPTIMIZERS = {
    "muon": ("train.average_decay=0.9",),
    "8 bit, tp": (
        "parallel.tp=2",
        "optimizer.kind=adamw",
        "optimizer.state_bits=8",
        "optimizer.block_size=16",
        "optimizer.min_8bit_size=0",
    ),
}


@pytest.mark.fault(
    "kill -9 of all ranks between two checkpoints, with copies in memory", "the newest copies; same bits"
)
@pytest.mark.parametrize(("ranks", "what"), [(1, "muon"), (2, "8 bit, tp")])
def test_killed_ranks_go_on_from_memory(gloo: Callable, tmp_path: Path, data: Path, ranks: int, what: str) -> None:
    """Beside training: the copy of step 5 is done when that of step 6 begins; that one may be done or not."""
    changes = ("checkpoint.asynchronous=true", *OPTIMIZERS[what])
    config = configured(tmp_path, data, *changes)
    with pytest.raises(WorkerError, match="died"):
        gloo(ranks, run, config, 7, True)
    assert gloo(ranks, run, config) == [(8, [])] * ranks
    ((step, from_peers),) = resumed(config)
    assert step in (5, 6)
    assert from_peers == []
    assert began(config) == [0, step]
    assert files(config) == []
    never = configured(tmp_path, data, *changes, "run.name=never", "checkpoint.memory_every_steps=0")
    assert gloo(ranks, run, never) == [(8, [])] * ranks
    check_same(config, never)


def test_a_copy_is_on_two_machines_and_a_finished_run_leaves_none(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config
) -> None:
    config = copy_of(crashed, tmp_path, data)
    for rank in range(3):
        for step in (5, 6):
            own, peers = kept(config, rank, rank, step), kept(config, (rank + 1) % 3, rank, step)
            assert [p.read_bytes() for p in sorted(own.iterdir())] == [p.read_bytes() for p in sorted(peers.iterdir())]
    assert gloo(3, run, config) == [(8, [])] * 3
    assert resumed(config) == [(6, [])]
    assert files(config) == []
    check_same(config, whole)
    assert {record["step"] for record in records(config, "memory")} == {1, 2, 3, 4, 5, 6, 7}


def test_a_copied_run_folder_is_another_run(gloo: Callable, tmp_path: Path, data: Path, crashed: Config) -> None:
    """It has the same id, and neither takes nor removes what the other has in memory."""
    shutil.copytree(crashed.run.folder, tmp_path / "tiny")
    shutil.copytree(crashed.checkpoint.memory_folder, tmp_path / "memory")
    config = configured(tmp_path, data)
    before = files(config)
    assert gloo(3, run, config) == [(8, [])] * 3
    assert resumed(config) == []
    assert began(config) == [0, 4]
    assert files(config) == before


@pytest.mark.fault("a machine's copies lost with it", "its ranks take those of their peers; the same bits")
def test_a_lost_machine(gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config) -> None:
    config = copy_of(crashed, tmp_path, data)
    shutil.rmtree(tmp_path / "memory" / "machine-1")
    assert gloo(3, run, config) == [(8, [])] * 3
    assert resumed(config) == [(6, [1])]
    check_same(config, whole)


@pytest.mark.fault("copies of two neighbouring machines lost", "said in one line; from the checkpoint, the same bits")
def test_two_lost_neighbours(gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config) -> None:
    config = copy_of(crashed, tmp_path, data)
    for machine in (1, 2):
        shutil.rmtree(tmp_path / "memory" / f"machine-{machine}")
    (first, said), *others = gloo(3, run, config)
    assert (first, others) == (8, [(8, [])] * 2)
    assert said == ["of step 6 no copy in memory is left for rank 1; the run goes on without them"]
    assert (resumed(config), began(config)) == ([], [0, 4])
    check_same(config, whole)


def flip_tensor(path: Path) -> None:
    (file,) = path.glob("rank-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_file(path: Path) -> None:
    (file,) = path.glob("rank-*")
    file.write_bytes(file.read_bytes()[:-1])


def flip_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"rank", b"tank", 1))


@pytest.mark.fault("a copy in memory damaged", "counts as missing: the peer's, or the copies before; the same bits")
@pytest.mark.parametrize("damage", [flip_tensor, cut_file, flip_manifest])
def test_a_damaged_copy(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config, damage: Callable[[Path], None]
) -> None:
    """Rank 1's own; with the flipped tensor, that which its peer keeps too, which is found when it has been sent."""
    config = copy_of(crashed, tmp_path, data)
    damage(kept(config, 1, 1, 6))
    if damage is flip_tensor:
        damage(kept(config, 2, 1, 6))
    (_, said), *others = gloo(3, run, config)
    assert others == [(8, [])] * 2
    assert len(said) == (2 if damage is flip_tensor else 1)
    assert all(line.endswith("; it counts as missing") for line in said)
    assert resumed(config) == [(5, []) if damage is flip_tensor else (6, [1])]
    check_same(config, whole)


@pytest.mark.parametrize(
    ("ranks", "overrides", "said"),
    [
        (2, (), "another number of processes (3, now 2)"),
        (3, ("parallel.dp_shard=1", "parallel.dp_replicate=3"), "another layout"),
        (3, ("checkpoint.fresh_optimizer=true", "optimizer.kind=adamw"), "another optimizer"),
    ],
    ids=["processes", "layout", "optimizer"],
)
def test_copies_of_something_else_are_passed_over(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config, ranks: int, overrides: tuple[str, ...], said: str
) -> None:
    config = copy_of(crashed, tmp_path, data, *overrides)
    (first, lines), *others = gloo(ranks, run, config)
    assert (first, others) == (8, [(8, [])] * (ranks - 1))
    (line,) = lines
    assert line.startswith(f"the copies in memory of step 6 are of {said}")
    assert (resumed(config), began(config)) == ([], [0, 4])
    assert [path for path in files(config) if ranks == 3 or not path.startswith("machine-2/")] == []


def test_without_a_checkpoint_nothing_fixes_the_configuration(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config
) -> None:
    """As without copies in memory: the run begins anew."""
    config = copy_of(crashed, tmp_path, data, "optimizer.lr=0.5")
    shutil.rmtree(config.run.folder / "checkpoints")
    (first, (line,)), *_ = gloo(3, run, config)
    assert first == 8
    assert line.startswith("the copies in memory of step 6 are of another configuration;")
    assert began(config) == [0, 0]


def test_a_deleted_run_folder_starts_over(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config
) -> None:
    config = copy_of(crashed, tmp_path, data)
    shutil.rmtree(config.run.folder)
    assert gloo(3, run, config) == [(8, [])] * 3
    assert began(config) == [0]
    check_same(config, whole)


def test_copies_stand_in_for_a_damaged_checkpoint(
    gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config
) -> None:
    """The only one, later than they are: without them the run would have ended."""
    config = copy_of(crashed, tmp_path, data)
    saved = config.run.folder / "checkpoints" / "step-00000004"
    later = saved.with_name("step-00000007")
    saved.rename(later)
    file = later / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (first, (line,)), *_ = gloo(3, run, config)
    assert first == 8
    assert "kept as damaged-step-00000007, and the run goes on from the copies in memory of step 6" in line
    assert resumed(config) == [(6, [])]
    check_same(config, whole)


def test_stopping_early_leaves_no_copies(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = configured(tmp_path, data)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "STOP").touch()
    ((step, _),) = gloo(1, run, config)
    assert 0 < step < 8
    assert files(config) == []
    assert gloo(1, run, config) == [(8, [])]
    assert began(config) == [0, step]


@pytest.mark.parametrize("where", ["write", "receive"])
def test_no_room(gloo: Callable, tmp_path: Path, data: Path, crashed: Config, whole: Config, where: str) -> None:
    """On one rank, in step 7: it is told of, the copy before stays, and no number changes."""
    config = configured(tmp_path, data)
    assert gloo(3, run, config, 8, False, (0, 0), (where, 7)) == [(-1, [])] * 3
    (failed,) = records(config, "memory_failed")
    assert failed["step"] == 7
    assert failed["reason"].startswith("rank 2: No space left on device")
    assert {int(path.split("step-")[1][:8]) for path in files(config)} == {6}
    assert len(files(config)) == 3 * 2 * 2
    assert gloo(3, run, config) == [(8, [])] * 3
    assert resumed(config) == [(6, [])]
    check_same(config, whole)


def test_no_memory(tmp_path: Path, gloo: Callable, data: Path) -> None:
    """What the machine could still give counts as well as the folder."""
    config = configured(tmp_path, data)
    assert gloo(1, run_with_little_memory, config) == [(8, [])]
    failed = records(config, "memory_failed")
    assert [record["step"] for record in failed] == list(range(1, 8))
    assert all(record["reason"].partition(", ")[2].startswith("0.0 MB of its memory are free") for record in failed)


def run_with_little_memory(config: Config) -> tuple[int, list[str]]:
    with mock.patch.object(copies, "available_memory", return_value=4096):
        return run(config)


def spiked(folder: Path, data: Path, *overrides: str) -> Config:
    """Steps 4 and 5 are the spike; the run goes back to the checkpoint of step 3."""
    names = ("spikes.deviations=20", "spikes.window=3", "spikes.patience=2", "train.batch_rows=4")
    return configured(folder, data, *names, "checkpoint.every_steps=3", *overrides)


@pytest.fixture(scope="module")
def never(gloo: Callable, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Config:
    """A run with a spike, without copies."""
    config = spiked(tmp_path_factory.mktemp("never"), data, "checkpoint.memory_every_steps=0")
    assert gloo(2, run, config, 0, False, BAD) == [(8, [])] * 2
    return config


@pytest.mark.parametrize(("call", "where", "shared"), [(6, 3, False), (8, 5, True)], ids=["just after", "later"])
def test_a_rewind_removes_the_copies_of_the_spike(
    gloo: Callable, tmp_path: Path, data: Path, never: Config, call: int, where: int, shared: bool
) -> None:
    """On one machine too, where rank 1 then takes what rank 0 kept of it beside its own."""
    config = spiked(tmp_path, data)
    assert gloo(2, run, config, call, False, BAD, ("", 0), shared) == [(-1, [])] * 2
    assert {int(path.split("step-")[1][:8]) for path in files(config)} == ({4, 5} if shared else {3})
    assert len(files(config)) == 2 * 2 * 2 * (2 if shared else 1)
    if shared:
        (own,) = (tmp_path / "memory").glob("*/rank-00001/of-rank-00001/step-00000005")
        shutil.rmtree(own)
    assert gloo(2, run, config, 0, False, BAD, ("", 0), shared) == [(8, [])] * 2
    assert (began(config), resumed(config)) == ([0, where], [(5, [1])] if shared else [])
    assert list((tmp_path / "memory").glob("*")) == [] if shared else files(config) == []
    assert records(config, "rewind") == records(never, "rewind")
    check_same(config, never)


def test_copies_from_before_a_rewind_are_not_used(gloo: Callable, tmp_path: Path, data: Path, never: Config) -> None:
    """Killed in the spike, the run meets it again; a machine that comes back then with copies of it is too late."""
    config = spiked(tmp_path, data)
    assert gloo(2, run, config, 5, False, BAD) == [(-1, [])] * 2
    shutil.copytree(tmp_path / "memory", tmp_path / "late")
    assert gloo(2, run, config, 2, False, BAD) == [(-1, [])] * 2
    assert resumed(config) == [], "cut by the rewind"
    shutil.rmtree(tmp_path / "memory")
    (tmp_path / "late").rename(tmp_path / "memory")
    (first, (line,)), *_ = gloo(2, run, config, 0, False, BAD)
    assert first == 8
    assert line.startswith("the copies in memory of step 4 are of the time before the run went back to a checkpoint;")
    assert began(config) == [0, 4, 3]
    assert records(config, "rewind") == records(never, "rewind")
    check_same(config, never)
