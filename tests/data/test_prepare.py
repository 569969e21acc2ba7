"""Preparing: deterministic, all or nothing, readable by others, and honest about what it met."""

import errno
import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from headrace import UserError
from headrace.data import PrepareConfig, TokenDataset, Tokenizer, TokenizerConfig, prepare
from headrace.data.corpus import Corpus, ReadCounts
from headrace.data.shards import ShardWriter

Make = Callable[..., PrepareConfig]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_there_with_its_text(prepared: Path, small_config: Make) -> None:
    corpus, tokenizer = Corpus(small_config(prepared)), Tokenizer.load(prepared)
    documents = [document for file in corpus.files for document in corpus.documents(file, ReadCounts())]
    for split, held_out in (("train", False), ("heldout", True)):
        expected = [document.text for document in documents if corpus.held_out(document) == held_out]
        dataset = TokenDataset(prepared, split)
        read = [dataset.document(i) for i in range(dataset.num_documents)]
        assert [tokenizer.decode(tokens[1:-1]) for tokens in read] == expected
        assert all(tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id for tokens in read)
        assert [dataset.document_bytes(i) for i in range(len(read))] == [len(text.encode()) for text in expected]
        assert [dataset.document_length(i) for i in range(len(read))] == [len(tokens) for tokens in read]
        assert dataset.num_tokens == sum(map(len, read))
        assert dataset.text_bytes == sum(len(text.encode()) for text in expected)
        assert not read[0].flags.writeable


def test_baselines_are_those_of_the_held_out_bytes(prepared: Path, small_config: Make) -> None:
    report = prepare(small_config(prepared))
    dataset = TokenDataset(prepared, "heldout")
    tokenizer = Tokenizer.load(prepared)
    text = "".join(tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)).encode()
    sizes = {"gzip": len(gzip.compress(text, 9)), "xz": len(lzma.compress(text, preset=9))}
    assert dataset.baselines == sizes
    for program, size in sizes.items():
        assert report.bits_per_byte(program) == 8 * size / len(text)
        assert any(f"{program} -9: {8 * size / len(text):.3f} bits per byte" in line for line in report.lines())


@pytest.mark.slow
def test_the_result_does_not_depend_on_workers_or_place(prepared: Path, small_config: Make, tmp_path: Path) -> None:
    report = prepare(small_config(tmp_path / "deep" / "er" / "out", workers=1))
    assert not report.reused
    assert contents(tmp_path / "deep" / "er" / "out") == contents(prepared)
    assert report.fingerprint == TokenDataset(prepared).fingerprint


def test_again_is_harmless_and_other_inputs_are_refused(
    prepared: Path, small_config: Make, text_folder: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    report = prepare(small_config(prepared, workers=1))
    assert report.reused
    assert report.lines()[-1].startswith(f"{prepared}: already there")
    for changes, named in (
        ({"seed": 1}, "seed"),
        ({"shard_mib": 2, "heldout_fraction": 0.2}, "heldout_fraction, shard_mib"),
        ({"tokenizer": replace(small_config(prepared).tokenizer, pieces="text")}, r"tokenizer\.pieces"),
        ({"tokenizer": TokenizerConfig(path=str(prepared))}, r"tokenizer\.hash, tokenizer\.max_piece_length, .*"),
    ):
        with pytest.raises(UserError, match=rf"prepared from other inputs \(different: {named}\); choose another out"):
            prepare(small_config(prepared, **changes))
    grown = shutil.copytree(text_folder, tmp_path / "grown")
    (grown / "one more.txt").write_text("text")
    with pytest.raises(UserError, match="different: corpus_listing"):
        prepare(small_config(prepared, corpus=str(grown)))
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_again_notices_damage(prepared: Path, small_config: Make, tmp_path: Path) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    (out / "heldout" / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"heldout/00000\.tar: No such file"):
        prepare(small_config(out))


def test_a_strange_folder_is_left_alone(small_config: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists and holds no prepared data; choose another out"):
        prepare(small_config(tmp_path))
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def fail_when_tokenising(error: BaseException) -> Callable[..., int]:
    def add(self: ShardWriter, tokens: object, text_bytes: int) -> int:
        raise error

    return add


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full: .*out was not written"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "cannot write .*out: Permission denied"),
        (KeyboardInterrupt("pressed"), KeyboardInterrupt, "pressed"),
    ],
)
def test_whatever_fails_leaves_nothing(
    error: BaseException,
    raised: type[BaseException],
    message: str,
    small_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ShardWriter, "add", fail_when_tokenising(error))
    with pytest.raises(raised, match=message):
        prepare(small_config(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(small_config: Make, tmp_path: Path) -> None:
    # A shell that started the tests in the background has them ignore SIGINT, and so would the child.
    code = f"""
import signal
from headrace.data import PrepareConfig, TokenizerConfig, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)
config = PrepareConfig(out={str(tmp_path / "out")!r}, tokenizer=TokenizerConfig(sample_bytes=2_000_000))
prepare(config, say=lambda line: print(line, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert any(path.name.startswith("out.tmp-") for path in tmp_path.iterdir())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_leave_one_whole(prepared: Path, small_config: Make, tmp_path: Path) -> None:
    """The other process finishes while this one tokenises."""
    config = small_config(tmp_path / "out")

    def other_finishes(line: str) -> None:
        if not Path(config.out).exists():
            shutil.copytree(prepared, config.out)

    with pytest.raises(UserError, match="made by another process in the meantime; run the command again"):
        prepare(config, say=other_finishes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert prepare(config).reused


def test_shards_are_plain_tar_files_that_webdataset_reads(prepared: Path, small_config: Make, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    dataset = TokenDataset(prepared)
    path = prepared / "train" / "00000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(samples) == dataset.num_documents
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{i:08d}"
        assert np.array_equal(np.frombuffer(sample["u16"], "<u2"), dataset.document(i))
    with tarfile.open(path) as archive:
        assert all(member.isreg() and member.mtime == 0 for member in archive)
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_shards_stay_below_their_size(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", dtype="u32", max_bytes=8192, tokenizer_hash="none")
    lengths = [100, 5000, 3, 700, 700, 700, 1]
    for length in lengths:
        writer.add(list(range(70_000, 70_000 + length)), length)
    entries = writer.close()
    assert [entry.num_documents for entry in entries] == [1, 1, 2, 2, 1]
    sizes = [(tmp_path / "train" / entry.name).stat().st_size for entry in entries]
    assert sizes == [entry.size for entry in entries]
    assert all(size <= 8192 for size in sizes[:1] + sizes[2:])


def test_a_given_tokenizer_is_used(prepared: Path, small_config: Make, tmp_path: Path) -> None:
    config = small_config(tmp_path / "out", tokenizer=TokenizerConfig(path=str(prepared / "tokenizer.model")))
    prepare(config)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    assert contents(tmp_path / "out" / "train") == contents(prepared / "train")
    assert prepare(config).reused


def test_a_wide_vocabulary_takes_four_bytes(write_documents: Callable[..., TokenDataset], tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[1, 70_000, 2]], max_bytes=1, vocab_size=1 << 17)
    assert dataset.document(0).dtype == np.dtype("<u4")
    assert dataset.document(0).tolist() == [1, 70_000, 2]


def test_what_was_met_is_reported(tmp_path: Path, small_config: Make, text_folder: Path) -> None:
    folder = shutil.copytree(text_folder, tmp_path / "corpus")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 30)
    (folder / "picture.png").write_bytes(b"x")
    lines = "\n".join(prepare(small_config(tmp_path / "out", corpus=str(folder), heldout_fraction=0)).lines())
    assert "62 files, 1 files of other kinds ignored" in lines
    assert "empty documents skipped: 1" in lines
    assert "undecodable characters replaced by U+FFFD: 30 in 1 files, as latin.txt" in lines
    assert "heldout: empty; raise heldout_fraction" in lines
    with pytest.raises(UserError, match="has no heldout documents; prepare the data again with another"):
        TokenDataset(tmp_path / "out", "heldout")


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match="leaves no text to train on"):
        prepare(PrepareConfig(corpus=str(tmp_path / "corpus"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_problems_are_listed_all_at_once() -> None:
    assert PrepareConfig().problems() == []
    config = PrepareConfig(
        corpus="",
        out="",
        text_suffixes=("txt", ".jsonl"),
        text_field="",
        heldout_fraction=0.7,
        shard_mib=0,
        seed=-1,
        workers=0,
        tokenizer=TokenizerConfig(vocab_size=3, pieces="long", max_piece_length=0, sample_bytes=1),
    )
    assert len(config.problems()) == 13
    with pytest.raises(UserError, match=r"heldout_fraction=0\.7 is outside 0\.\.0\.5; use 0\.02"):
        prepare(config)


def test_the_manifest_holds_the_inputs_and_no_place(prepared: Path, small_config: Make) -> None:
    data = (prepared / "manifest.json").read_text()
    assert os.sep + "tmp" not in data
    inputs = json.loads(data)["inputs"]
    expected = {*asdict(small_config(prepared)), "corpus_listing"} - {"corpus", "out", "workers"}
    assert set(inputs) == expected
