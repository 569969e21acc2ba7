"""Checkpoints in one process: round trips, listing, replacing, and what is refused with which words."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from headrace.pretrain.checkpoint import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointWriteError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_full,
    pieces,
    read_extra,
    read_rank_tensors,
    save_checkpoint,
    storage,
)
from headrace.pretrain.checkpoint_files.manifest import digest, read_manifest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8]


def tensors_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype, a scalar, an empty tensor, a strided view and a parameter."""
    source = torch.Generator().manual_seed(seed)
    tensors = {f"model.{str(d)[6:]}": (100 * torch.randn(5, 3, generator=source)).to(d) for d in DTYPES}
    tensors["model.bool"] = torch.tensor([True, False, True])
    tensors["optim.step"] = torch.tensor(float(seed))
    tensors["model.empty"] = torch.empty(0, 7)
    tensors["model.strided"] = torch.randn(6, 4, generator=source).t()[1:]
    tensors["model.weight"] = torch.nn.Parameter(torch.randn(4, generator=source))
    return tensors


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        same = found[name].detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def forge(path: Path, change) -> None:
    """Rewrites the manifest with `change(body)` applied and a valid hash, as an attacker would."""
    body = json.loads((path / "manifest.json").read_text())
    del body["blake2b"]
    change(body)
    # Indented, as they were once written.
    text = json.dumps(body, indent=1).removesuffix("\n}").encode()
    (path / "manifest.json").write_bytes(text + f',\n "blake2b": "{digest(text)}"\n}}\n'.encode())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 500, tensors_of(), extra={"tokens": 7}, rank_tensors={"rng": torch.arange(9)})


def test_round_trip(saved):
    wanted = tensors_of()
    found = blank(wanted)
    found["model.strided"] = torch.zeros(6, 3).t()
    load_checkpoint(saved, found)
    assert_same(found, wanted)
    assert_same(load_full(saved), wanted)
    assert_same(load_full(saved, ["model.bool"]), {"model.bool": wanted["model.bool"]})
    assert read_extra(saved) == {"tokens": 7}
    assert_same(read_rank_tensors(saved, 0) or {}, {"rng": torch.arange(9)})
    assert read_rank_tensors(saved, 1) is None


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6), st.sampled_from(DTYPES))
def test_round_trip_of_any_shapes(tmp_path_factory, shapes, dtype):
    folder = tmp_path_factory.mktemp("any")
    wanted = {f"model.{i}": (10 * torch.randn(shape)).to(dtype) for i, shape in enumerate(shapes)}
    path = save_checkpoint(folder, 1, wanted, extra={})
    found = blank(wanted)
    load_checkpoint(path, found)
    assert_same(found, wanted)
    assert_same(load_full(path), wanted)


def test_a_subset_can_be_loaded(saved):
    found = {"optim.step": torch.tensor(3.0)}
    load_checkpoint(saved, found)
    assert found["optim.step"] == 0


def test_layout_and_stock_safetensors(saved):
    assert saved.name == "step-00000500"
    assert sorted(os.listdir(saved)) == ["manifest.json", "rank-00000.safetensors"]
    wanted = tensors_of()
    with safe_open(saved / "rank-00000.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert torch.equal(found.pop("rank.rng"), torch.arange(9))
    assert_same(found, wanted)


def test_no_pickle(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something unpickles")

    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    found = blank(tensors_of())
    load_checkpoint(saved, found)
    save_checkpoint(saved.parent, 501, found, extra=read_extra(saved))
    assert_same(load_full(saved.parent / "step-00000501"), tensors_of())


def test_listing(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 100_000_000, 20):
        save_checkpoint(tmp_path, step, {}, extra={})
    (tmp_path / "step-7").mkdir()
    (tmp_path / ".tmp-step-00000030").mkdir()
    (tmp_path / "step-00000031").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000020", "step-100000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_the_same_step_is_replaced(saved):
    save_checkpoint(saved.parent, 500, {"model.other": torch.ones(2)}, extra={"tokens": 8})
    assert list(load_full(saved)) == ["model.other"]
    assert os.listdir(saved.parent) == [saved.name]


def test_keep_last(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, tensors_of(step), extra={}, keep_last=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["4", "5"]
    assert_same(load_full(tmp_path / "step-00000004"), tensors_of(4))
    # A run that was sent back to an earlier step must not lose what it has just saved.
    save_checkpoint(tmp_path, 3, {}, extra={}, keep_last=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3"]
    with pytest.raises(ValueError, match="keep_last=0"):
        save_checkpoint(tmp_path, 3, {}, extra={}, keep_last=0)


@pytest.mark.fault(
    "a disk that gives back other bytes than were written", "the save fails; no earlier checkpoint is removed"
)
def test_keep_last_removes_nothing_when_the_newest_reads_back_wrong(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors_of(), extra={})
    written = pieces.write_pieces

    def flip(path, sources):
        result = written(path, sources)
        with open(path, "r+b") as file:
            file.seek(-1, io.SEEK_END)
            last = file.read()
            file.seek(-1, io.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return result

    monkeypatch.setattr(storage, "write_pieces", flip)
    with pytest.raises(CheckpointWriteError, match="not what was written"):
        save_checkpoint(tmp_path, 2, tensors_of(), extra={}, keep_last=1)
    assert os.listdir(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("victim", ["write_pieces", "publish", "manifest_bytes"])
def test_a_crash_before_the_rename_leaves_the_previous_visible(saved, monkeypatch, victim):
    class PowerCut(BaseException):
        pass

    def cut(*args):
        raise PowerCut

    monkeypatch.setattr(storage, victim, cut)
    # A power cut runs no clean-up either.
    monkeypatch.setattr("headrace.pretrain.checkpoint.save.shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(PowerCut):
        save_checkpoint(saved.parent, 501, tensors_of(1), extra={})
    monkeypatch.undo()
    assert list_checkpoints(saved.parent) == [saved]
    assert sorted(os.listdir(saved.parent)) == [".tmp-step-00000501", saved.name]
    save_checkpoint(saved.parent, 502, tensors_of(1), extra={})
    assert sorted(os.listdir(saved.parent)) == [saved.name, "step-00000502"]


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
from headrace.pretrain.checkpoint import list_checkpoints, load_full, save_checkpoint

torch.set_num_threads(1)
draw, folder, newest, interrupted = random.Random(1), sys.argv[1], 0, 0
for _ in range(25):
    child = os.fork()
    if not child:
        for step in range(newest + 1, newest + 1000):
            save_checkpoint(folder, step, {f"t{i}": torch.full((2000,), step) for i in range(9)}, extra={}, keep_last=2)
        os._exit(1)
    time.sleep(draw.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    interrupted += any(name.startswith(".tmp-") for name in os.listdir(folder))
    steps = [int(path.name[5:]) for path in list_checkpoints(folder)]
    for step, path in zip(steps, list_checkpoints(folder)):
        assert all((tensor == step).all() for tensor in load_full(path).values()), path
    assert max(steps, default=0) >= newest, "a checkpoint was lost"
    newest = max(steps, default=0)
save_checkpoint(folder, newest + 1, {}, extra={}, keep_last=2)
assert len(os.listdir(folder)) == 2, "something was left behind"
print(newest, interrupted)
"""


@pytest.mark.fault("kill -9 at a random moment of a save", "the earlier checkpoint or the new one, whole")
def test_kill_9_while_saving(tmp_path, record_property):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    newest, interrupted = map(int, found.stdout.split())
    assert newest > 10
    assert interrupted > 5  # most kills really fell into a save
    record_property("tried", 25)


@pytest.mark.gpu
def test_cuda_tensors(tmp_path):
    wanted = tensors_of()
    path = save_checkpoint(tmp_path, 1, {name: tensor.cuda() for name, tensor in wanted.items()}, extra={})
    found = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in wanted.items()}
    load_checkpoint(path, found)
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, wanted)


def test_a_failed_save_cleans_up(saved, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pieces, "_write", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000501 was not saved: No space left.*the last checkpoint is .*500"
    ):
        save_checkpoint(saved.parent, 501, tensors_of(), extra={})
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.fault(
    "a disk too small for a checkpoint (a tmpfs of 1 MiB)", "not saved, in one line; the earlier checkpoint is whole"
)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_really_full_disk(tmp_path, monkeypatch, foreseen):
    if not foreseen:
        monkeypatch.setattr(storage, "check_room", lambda *args: None)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        save_checkpoint(tmp_path, 1, {"model.a": torch.ones(100_000)}, extra={})
        words = (
            "0.8 MB are to be written, 0.6 MB are free" if foreseen else "No space left on device .rank 0, while writ"
        )
        with pytest.raises(CheckpointWriteError, match=words):
            save_checkpoint(tmp_path, 2, {"model.a": torch.ones(200_000)}, extra={}, keep_last=1)
        assert os.listdir(tmp_path) == ["step-00000001"]
        assert load_full(tmp_path / "step-00000001")["model.a"].sum() == 100_000
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="clash"):
        save_checkpoint(tmp_path, 1, {"a@0": torch.ones(1)}, extra={})
    with pytest.raises(ValueError, match="complex64"):
        save_checkpoint(tmp_path, 1, {"a": torch.ones(1, dtype=torch.complex64)}, extra={})
    with pytest.raises(ValueError, match="rng has dtype"):
        save_checkpoint(tmp_path, 1, {}, extra={}, rank_tensors={"rng": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="not a tensor"):
        save_checkpoint(tmp_path, 1, {"a": 3}, extra={})
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, extra={"loss": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, extra={"loss": torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_mismatch_between_model_and_checkpoint(saved):
    for wanted, words in [
        ({"model.nope": torch.ones(1), "model.never": torch.ones(1)}, "has no tensor model.nope and 1 more"),
        ({"model.float32": torch.ones(5, 4)}, r"shape \[5, 3\], wanted \[5, 4\]"),
        ({"model.float32": torch.ones(5, 3).half()}, "saved as torch.float32, wanted torch.float16"),
    ]:
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(saved, wanted)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="has no tensor x"):
        load_full(saved, ["x"])


def test_not_a_checkpoint(saved, tmp_path):
    for path, words in [
        (tmp_path / "nothing", "is not a checkpoint"),
        (tmp_path, f"did you mean {saved}"),
        (saved / "manifest.json", "is not a checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            read_extra(path)


def test_a_manifest_is_written_fast(saved, monkeypatch):
    """By json's encoder in C, which `indent` would turn off, so in two lines: all that is hashed, and the hash."""
    first, second, last = (saved / "manifest.json").read_bytes().splitlines()
    assert digest(first.removesuffix(b",")) == json.loads(b"{" + second + b"}")["blake2b"]
    assert last == b"}"
    monkeypatch.setattr(json.encoder, "_make_iterencode", None)
    save_checkpoint(saved.parent, 501, tensors_of(), extra={})


def test_an_indented_manifest_is_read(saved):
    """As they were written once; and a change in it is still seen."""
    file, wanted = saved / "manifest.json", read_manifest(saved)
    forge(saved, lambda body: None)
    text = file.read_bytes()
    assert text.startswith(b'{\n "format": "headrace-checkpoint",\n "version": 1,\n')
    assert text.count(b"\n") > 100
    assert read_manifest(saved) == wanted
    assert_same(load_full(saved), tensors_of())
    file.write_bytes(text.replace(b'"tokens": 7', b'"tokens": 8'))
    with pytest.raises(CheckpointDamagedError, match="its hash differs"):
        load_full(saved)


def test_newer_format(saved):
    forge(saved, lambda body: body.update(version=2))
    with pytest.raises(CheckpointError, match="format version 2; this Headrace reads 1"):
        load_full(saved)


def _set_file(body: dict, name: str) -> None:
    body["files"][name] = body["files"].pop("rank-00000.safetensors")
    for entry in body["tensors"].values():
        for piece in entry["pieces"]:
            piece["file"] = name


def _piece(body: dict) -> dict:
    return body["tensors"]["model.float32"]["pieces"][0]


FORGERIES = {
    "absolute": lambda body: _set_file(body, "/etc/passwd"),
    "parent": lambda body: _set_file(body, "../rank-00000.safetensors"),
    "subfolder": lambda body: _set_file(body, "a/rank-00000.safetensors"),
    "undeclared": lambda body: _piece(body).update(file="rank-00001.safetensors"),
    "outside": lambda body: _piece(body).update(offsets=[1, 0]),
    "negative": lambda body: _piece(body).update(offsets=[-1, 0]),
    "hole": lambda body: _piece(body).update(sizes=[4, 3], bytes=48),
    "huge": lambda body: _piece(body).update(sizes=[1 << 40, 3], bytes=3 << 42),
    "other span": lambda body: _piece(body).update(key="model.float64"),
    "key": lambda body: _piece(body).update(key=["model.float32"]),
    "fields": lambda body: _piece(body).update(path="x"),
    "dtype": lambda body: body["tensors"]["model.float32"].update(dtype="object"),
    "dtype of the same width": lambda body: body["tensors"]["model.bfloat16"].update(dtype="float16"),
    "shape": lambda body: body["tensors"]["model.float32"].update(shape=[5, 3.0]),
    "header": lambda body: body["files"]["rank-00000.safetensors"].update(header_bytes=1 << 60),
    "format": lambda body: body.update(format="other"),
    "version": lambda body: body.update(version="1"),
    "no tensors": lambda body: body.pop("tensors"),
    "list": lambda body: body.update(files=[]),
    "extra": lambda body: body.update(extra=3),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_manifest(saved, forgery):
    forge(saved, FORGERIES[forgery])
    with pytest.raises(CheckpointDamagedError) as caught:
        load_full(saved)
    assert "\n" not in str(caught.value)


def test_links_and_pipes_are_not_followed(saved, tmp_path):
    file = saved / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointDamagedError, match="cannot be read"):
        load_full(saved)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointDamagedError, match="not a regular file"):
        load_full(saved)


def test_the_previous_good_checkpoint_is_offered(tmp_path):
    good, bad, newest = [save_checkpoint(tmp_path, step, tensors_of(), extra={}) for step in (1, 2, 3)]
    (newest / "rank-00000.safetensors").unlink()
    offer = f"the previous good checkpoint is {bad}: remove {newest} to go on from there"
    with pytest.raises(CheckpointDamagedError, match=f"is missing; {offer}"):
        load_checkpoint(newest, blank(tensors_of()))
    (bad / "manifest.json").unlink()
    with pytest.raises(CheckpointDamagedError, match=f"the previous good checkpoint is {good}"):
        read_extra(bad)
    (good / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointDamagedError, match="no older good checkpoint"):
        read_rank_tensors(good, 0)
