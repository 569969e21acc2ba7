"""Damaged and forged data is refused, with the file, the fault and the remedy."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from headrace import UserError
from headrace.data import TokenDataset, Tokenizer, check_tokenizer
from headrace.data.manifest import write_manifest
from headrace.data.shards import hash_bytes

INDEX = "train/00000.idx.safetensors"
SHARD = "train/00000.tar"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(prepared, tmp_path / "data")


def read_all(folder: Path) -> None:
    dataset = TokenDataset(folder)
    for i in range(dataset.num_documents):
        dataset.document(i)


def change(path: Path, position: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    assert data[position : position + len(value)] != value
    data[position : position + len(value)] = value
    path.write_bytes(data)


def change_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "manifest.json").read_bytes())
    edit(values)
    (folder / "manifest.json").write_bytes(write_manifest(values))


def first_shard(values: dict[str, Any]) -> dict[str, Any]:
    return values["splits"]["train"]["shards"][0]


def forge_index(
    folder: Path, edit: Callable[[dict[str, np.ndarray]], object], about: dict[str, Any] | None = None
) -> None:
    """An index with other values, and a manifest that vouches for it."""
    data = (folder / INDEX).read_bytes()
    columns = {name: column.copy() for name, column in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["headrace"]
    edit(columns)
    data = save(columns, metadata={"headrace": json.dumps(json.loads(header) | (about or {}))})
    (folder / INDEX).write_bytes(data)
    change_manifest(
        folder, lambda values: first_shard(values).update(index_size=len(data), index_blake2b=hash_bytes(data))
    )


def second_offset(folder: Path) -> int:
    return int(load((folder / INDEX).read_bytes())["offset"][1])


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def replace_member(folder: Path, **fields: Any) -> None:
    """Rewrites the second member's header, checksum included, leaving everything else."""
    offset = second_offset(folder)
    path = folder / SHARD
    info = tarfile.TarInfo.frombuf(path.read_bytes()[offset - 512 : offset], "ascii", "strict")
    for name, value in fields.items():
        setattr(info, name, value)
    change(path, offset - 512, info.tobuf(format=tarfile.USTAR_FORMAT))


AT_OPENING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shard": (lambda f: (f / SHARD).unlink(), r"cannot read .*train/00000\.tar: No such file.*; copy it again"),
    "no index": (lambda f: (f / INDEX).unlink(), r"cannot read .*00000\.idx\.safetensors: No such file"),
    "cut shard": (lambda f: truncate(f / SHARD, 1024), r"00000\.tar holds \d+ bytes, its manifest says \d+; copy"),
    "cut index": (lambda f: truncate(f / INDEX, 8), r"00000\.idx\.safetensors holds \d+ bytes, its manifest says"),
    "folder for a shard": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
        r"00000\.tar is not a regular file",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"holds no prepared data .*run `headrace prepare` first"),
    "no json": (lambda f: truncate(f / "manifest.json", 20), r"manifest\.json is damaged .*prepare the data again"),
    "other format": (lambda f: change_manifest(f, lambda v: v.update(format="x")), '"format" is not headrace-tokens-1'),
    "other dtype": (lambda f: change_manifest(f, lambda v: v.update(dtype="pkl")), '"dtype" is not one of u16, u32'),
    "lost key": (lambda f: change_manifest(f, lambda v: v.pop("tokenizer")), r"damaged \('tokenizer'\)"),
    "parent path": (
        lambda f: change_manifest(f, lambda v: first_shard(v).update(name="../train/00000.tar")),
        r"shard name '\.\./train/00000\.tar' is not of the form 00000\.tar",
    ),
    "absolute path": (
        lambda f: change_manifest(f, lambda v: first_shard(v).update(name="/etc/passwd")),
        "is not of the form",
    ),
    "shell": (lambda f: change_manifest(f, lambda v: first_shard(v).update(name="pipe:id")), "is not of the form"),
    "twice": (
        lambda f: change_manifest(f, lambda v: v["splits"]["train"]["shards"].append(first_shard(v))),
        "a shard of train is named twice",
    ),
    "text for a number": (
        lambda f: change_manifest(f, lambda v: first_shard(v).update(size="9")),
        '"size" is not a valid int',
    ),
    "negative": (lambda f: change_manifest(f, lambda v: first_shard(v).update(num_tokens=-1)), '"num_tokens" is not'),
    "unknown field": (
        lambda f: change_manifest(f, lambda v: first_shard(v).update(url="x")),
        "are not those of a shard",
    ),
}

AT_READING: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed index": (lambda f: change(f / INDEX, -8, b"\x77"), r"00000\.idx\.safetensors was changed: its blake2b"),
    "changed token": (
        lambda f: change(f / SHARD, second_offset(f) + 4, b"\xff\x01"),
        r"00000\.tar, member 00000001\.u16: its tokens were changed \(CRC-32 differs\); copy it again",
    ),
    "changed header": (
        lambda f: change(f / SHARD, second_offset(f) - 500, b"X"),
        r"member 00000001\.u16: its tar header was changed",
    ),
    "member elsewhere": (lambda f: replace_member(f, name="../01.u16"), r"member 00000001\.u16: its tar header"),
    "member twice": (lambda f: replace_member(f, name="00000000.u16"), r"member 00000001\.u16: its tar header"),
    "pickle": (lambda f: replace_member(f, name="00000001.pkl"), r"member 00000001\.u16: its tar header"),
    "link": (lambda f: replace_member(f, type=tarfile.SYMTYPE, size=0), r"member 00000001\.u16: its tar header"),
    "other size": (lambda f: replace_member(f, size=10), r"member 00000001\.u16: its tar header"),
    "outside": (
        lambda f: forge_index(f, lambda c: c["offset"].__setitem__(-1, 1 << 40)),
        r"is not the index of 00000\.tar \(a document is outside the shard\)",
    ),
    "negative offset": (lambda f: forge_index(f, lambda c: c["offset"].__setitem__(0, -512)), "outside the shard"),
    "too long": (lambda f: forge_index(f, lambda c: c["num_tokens"].__setitem__(-1, 10**5)), "lie outside the shard"),
    "overlap": (lambda f: forge_index(f, lambda c: c["offset"].__setitem__(1, c["offset"][0])), "documents overlap"),
    "sums": (lambda f: forge_index(f, lambda c: c["text_bytes"].__setitem__(0, 1)), "its sums are not the manifest's"),
    "columns": (lambda f: forge_index(f, lambda c: c.pop("crc32")), "its columns are not those of an index"),
    "types": (lambda f: forge_index(f, lambda c: c.update(offset=c["offset"].astype(float))), "its columns are not"),
    "lengths": (lambda f: forge_index(f, lambda c: c.update(offset=c["offset"][1:])), r"it has not \d+ documents"),
    "another's": (lambda f: forge_index(f, lambda c: None, {"shard": "00001.tar"}), "it belongs to another shard"),
    "another dtype": (lambda f: forge_index(f, lambda c: None, {"dtype": "u32"}), "it belongs to another shard"),
}


@pytest.mark.parametrize("case", AT_OPENING)
def test_refused_at_opening(folder: Path, case: str) -> None:
    damage, message = AT_OPENING[case]
    damage(folder)
    with pytest.raises(UserError, match=message):
        TokenDataset(folder)


@pytest.mark.parametrize("case", AT_READING)
def test_refused_at_first_use(folder: Path, case: str) -> None:
    damage, message = AT_READING[case]
    read_all(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_all(folder)


def test_every_changed_token_byte_is_noticed(folder: Path) -> None:
    columns = load((folder / INDEX).read_bytes())
    original = (folder / SHARD).read_bytes()
    for number in range(0, len(columns["offset"]), 10):
        size = 2 * int(columns["num_tokens"][number])
        for place in (0, size // 2, size - 1):
            data = bytearray(original)
            data[int(columns["offset"][number]) + place] ^= 0x10
            (folder / SHARD).write_bytes(data)
            dataset = TokenDataset(folder)
            with pytest.raises(UserError, match=f"member {number:08d}"):
                dataset.document(number)


def test_verify_reads_what_no_document_holds(folder: Path) -> None:
    TokenDataset(folder).verify()
    change(folder / SHARD, -100, b"hidden")
    read_all(folder)
    with pytest.raises(UserError, match=r"00000\.tar was changed: its blake2b sum is not the manifest's"):
        TokenDataset(folder).verify()


def test_any_change_of_the_manifest_changes_the_fingerprint(folder: Path, prepared: Path) -> None:
    change_manifest(folder, lambda values: values["corpus"].update(empty_documents=99))
    assert TokenDataset(folder).fingerprint != TokenDataset(prepared).fingerprint


def test_positions_outside(prepared: Path) -> None:
    dataset = TokenDataset(prepared)
    for i in (-1, dataset.num_documents):
        with pytest.raises(IndexError, match="outside"):
            dataset.document(i)
    with pytest.raises(ValueError, match="train, heldout"):
        TokenDataset(prepared, "test")


def test_more_shards_than_stay_open(write_documents: Callable[..., TokenDataset], tmp_path: Path) -> None:
    documents = [[1, i, 2] for i in range(300)]
    dataset = write_documents(tmp_path, documents, max_bytes=1, vocab_size=1000)
    assert len(dataset.shards) == 300
    for _ in range(2):
        assert [dataset.document(i).tolist() for i in range(300)] == documents
    held = [dataset.document(i) for i in range(300)]
    assert [tokens.tolist() for tokens in held] == documents


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    dataset = TokenDataset(prepared)
    check_tokenizer(dataset, Tokenizer.load(prepared))
    other = Tokenizer.train(["other text, but enough of it"] * 9, vocab_size=280, max_piece_length=4, pieces="word")
    with pytest.raises(UserError, match=r"is not the one that wrote .*; use .*tokenizer\.model"):
        check_tokenizer(dataset, other)
