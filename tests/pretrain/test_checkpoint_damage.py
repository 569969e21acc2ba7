"""Hundreds of random flips, cuts and additions in every file of a checkpoint: each one refused, in one line."""

import random
import shutil

import pytest
import torch

from headrace.pretrain.checkpoint import (
    CheckpointDamagedError,
    load_checkpoint,
    load_full,
    read_extra,
    read_rank_tensors,
    save_checkpoint,
)


def _save(folder):
    tensors = {
        "model.a": torch.randn(7, 5),
        "model.b": torch.randn(3).bfloat16(),
        "optim.step": torch.tensor(4.0),
        "model.c": torch.arange(5, dtype=torch.uint8),
    }
    return save_checkpoint(folder, 9, tensors, extra={"text": "å"}, rank_tensors={"rng": torch.arange(40).byte()})


def _read_everything(path):
    load_full(path)
    read_extra(path)
    read_rank_tensors(path, 0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("original"))


@pytest.mark.fault(
    "bytes of a checkpoint flipped, cut off, taken out, zeroed, put in", "refused; file and reason named"
)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_damage_is_refused(original, tmp_path, name, record_property):
    draw = random.Random(name)
    path = tmp_path / "step-00000009"
    shutil.copytree(original, path)
    _read_everything(path)
    whole = (path / name).read_bytes()
    kinds = {
        "flip": lambda i: whole[:i] + bytes([whole[i] ^ (1 << draw.randrange(8))]) + whole[i + 1 :],
        "cut": lambda i: whole[:i],
        "hole": lambda i: whole[:i] + whole[i + 1 + draw.randrange(9) :],
        "zeros": lambda i: whole[:i] + bytes(len(whole) - i),
        "more": lambda i: whole[:i] + bytes([draw.randrange(256)]) + whole[i:],
    }
    refused = 0
    for kind, damage in kinds.items():
        for _ in range(200 if kind == "flip" else 40):
            changed = damage(draw.randrange(len(whole)))
            if changed == whole:
                continue
            (path / name).write_bytes(changed)
            with pytest.raises(CheckpointDamagedError) as caught:
                _read_everything(path)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
            refused += 1
    assert refused > 300
    record_property("tried", refused)


@pytest.mark.fault("a flipped bit in each byte of a checkpoint's pieces", "refused")
def test_every_single_bit_of_the_pieces(original, tmp_path, record_property):
    """No byte of the file is unguarded: header, padding, tensors, rank tensors."""
    path = tmp_path / "step-00000009"
    shutil.copytree(original, path)
    file = path / "rank-00000.safetensors"
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(CheckpointDamagedError):
            _read_everything(path)
    record_property("tried", len(whole))


def test_load_checkpoint_checks_what_it_reads(original, tmp_path):
    path = tmp_path / "step-00000009"
    shutil.copytree(original, path)
    file = path / "rank-00000.safetensors"
    at = file.read_bytes().index(load_full(path)["model.a"].numpy().tobytes())
    with open(file, "r+b") as handle:
        handle.seek(at)
        handle.write(b"\xff")
    load_checkpoint(path, {"model.b": torch.zeros(3).bfloat16()})
    for target in (torch.zeros(7, 5), torch.zeros(5, 7).t()):
        with pytest.raises(CheckpointDamagedError, match=r"hash of 'model\.a' differs"):
            load_checkpoint(path, {"model.a": target})
