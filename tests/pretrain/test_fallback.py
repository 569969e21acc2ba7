"""A run whose newest checkpoint is damaged goes on from the newest whole one, and keeps the damaged one aside."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from headrace.errors import UserError
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.trainer import train
from tiny import losses, this_world, tiny_config


def run(config: Config) -> tuple[int, list[str]]:
    """The step a run ends at and the warnings of this rank, or its error."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("headrace.pretrain.resume")
    logger.addHandler(handler)
    try:
        return train(config, this_world()).step, said
    except UserError as error:
        return -1, [str(error) if error.everywhere else "every rank would print its own"]
    finally:
        logger.removeHandler(handler)


def checkpoint(config: Config, step: int, name: str = "") -> Path:
    return config.run.folder / "checkpoints" / f"step-{step:08}" / name


def cut(config: Config, step: int) -> str:
    file = checkpoint(config, step, "rank-00001.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    return "rank-00001.safetensors has "


def flip(config: Config, step: int, key: str = "model.") -> str:
    """One bit of one tensor: nothing but its hash tells."""
    for file in sorted(checkpoint(config, step).glob("rank-*")):
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name.startswith(key):
                data[8 + length + entry["data_offsets"][0]] ^= 1
                file.write_bytes(data)
                return f"{file.name} is not what was written (the hash of {name!r} differs)"
    raise AssertionError(key)


def flip_random_state(config: Config, step: int) -> str:
    """Found when all tensors are loaded, by the first rank alone."""
    return flip(config, step, "rank.cpu")


def lose_piece(config: Config, step: int) -> str:
    checkpoint(config, step, "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors is missing"


def lose_manifest(config: Config, step: int) -> str:
    checkpoint(config, step, "manifest.json").unlink()
    return "manifest.json is missing"


def alter_manifest(config: Config, step: int) -> str:
    file = checkpoint(config, step, "manifest.json")
    file.write_bytes(file.read_bytes().replace(b"rank", b"tank", 1))
    return "manifest.json is not what was written"


@pytest.fixture(scope="module")
def whole(gloo: Callable, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Config:
    """A finished run of two ranks, with checkpoints at 2, 4 and 6."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), data)
    assert gloo(2, run, config) == [(6, [])] * 2
    return config


def copy_of(whole: Config, folder: Path, data: Path) -> Config:
    shutil.copytree(whole.run.folder, folder / "tiny")
    return tiny_config(folder, data)


def assert_same_run(config: Config, whole: Config) -> None:
    assert losses(config) == losses(whole)
    found, wanted = (load_full(latest_checkpoint(c.run.folder / "checkpoints")) for c in (config, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.fault(
    "the newest checkpoint cut, flipped, without a piece or manifest",
    "set aside; goes on from the one before; the same bits",
)
@pytest.mark.parametrize("damage", [cut, flip, flip_random_state, lose_piece, lose_manifest, alter_manifest])
def test_the_run_goes_on_from_the_one_before(
    gloo: Callable, tmp_path: Path, data: Path, whole: Config, damage: Callable[[Config, int], str]
) -> None:
    config = copy_of(whole, tmp_path, data)
    what = damage(config, 6)
    damaged = {path.name: path.read_bytes() for path in checkpoint(config, 6).iterdir()}
    (step, said), other = gloo(2, run, config)
    assert (step, other) == (6, (6, []))
    (line,) = said
    assert what in line
    assert f"kept as damaged-step-00000006, and the run goes on from {checkpoint(config, 4)}" in line
    aside = checkpoint(config, 6).with_name("damaged-step-00000006")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    assert_same_run(config, whole)


@pytest.mark.fault("the two newest checkpoints damaged", "both set aside; goes on from the third; the same bits")
def test_several_are_damaged(gloo: Callable, tmp_path: Path, data: Path, whole: Config) -> None:
    """The newest shows it when loaded, the next by its size; a name is taken."""
    config = copy_of(whole, tmp_path, data)
    flip(config, 6)
    cut(config, 4)
    checkpoint(config, 6).with_name("damaged-step-00000004").mkdir()
    (step, said), _ = gloo(2, run, config)
    assert step == 6
    assert ["step-00000006" in said[0], "step-00000004" in said[1], len(said)] == [True, True, 2]
    assert "damaged-step-00000004-2" in said[1]
    assert_same_run(config, whole)


@pytest.mark.fault("every checkpoint damaged", "the run ends in one line, and keeps them all")
def test_the_last_one_is_never_given_up(gloo: Callable, tmp_path: Path, data: Path, whole: Config) -> None:
    config = copy_of(whole, tmp_path, data)
    for step in (6, 4, 2):
        flip(config, step)
    for _ in range(2):  # the second start finds only the last
        for step, said in gloo(2, run, config):
            assert step == -1
            assert f"{checkpoint(config, 2)}: rank-" in said[0]
            assert "there is no older good checkpoint beside it" in said[0]
    names = sorted(path.name for path in checkpoint(config, 2).parent.iterdir())
    assert names == ["damaged-step-00000004", "damaged-step-00000006", "step-00000002"]


def run_blind(config: Config) -> tuple[int, list[str]]:
    """Rank 1 does not see its file, which is there."""
    import headrace.pretrain.checkpoint_files.piece_file as pieces

    original = pieces.open_regular

    def blind(path: Path) -> int:
        if dist.get_rank() == 1 and path.name == "rank-00001.safetensors":
            raise FileNotFoundError(path)
        return original(path)

    pieces.open_regular = blind
    try:
        return run(config)
    finally:
        pieces.open_regular = original


@pytest.mark.fault("a checkpoint that one machine does not see", "the run ends in one line; nothing is set aside")
def test_what_one_machine_does_not_see_is_not_damage(gloo: Callable, tmp_path: Path, data: Path, whole: Config) -> None:
    config = copy_of(whole, tmp_path, data)
    for step, said in gloo(2, run_blind, config):
        assert step == -1
        assert "is missing on another rank, but is there on rank 0" in said[0]
    assert checkpoint(config, 6).is_dir()


def test_state_that_a_damaged_checkpoint_half_filled_is_not_used(
    gloo: Callable, tmp_path: Path, data: Path, whole: Config
) -> None:
    """The older checkpoint is of another optimizer, so nothing would overwrite the state."""
    config = copy_of(whole, tmp_path, data)
    shutil.rmtree(checkpoint(config, 6))
    fresh = tiny_config(tmp_path, data, "optimizer.kind=adamw", "checkpoint.fresh_optimizer=true")
    assert [step for step, _ in gloo(2, run, fresh)] == [6, 6]
    flip(fresh, 6)
    ((step, said), _) = gloo(2, run, fresh)
    assert step == -1, said
    assert f"{checkpoint(config, 4)} was saved by another optimizer than the damaged checkpoint" in said[0]
    assert [step for step, _ in gloo(2, run, fresh)] == [6, 6]
