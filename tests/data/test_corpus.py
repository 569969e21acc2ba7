"""Reading a corpus: kinds of files, what is counted, and what is refused with which words."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace import UserError
from headrace.data import PrepareConfig
from headrace.data.corpus import Corpus, Document, ReadCounts

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LINES = b'{"text": "one"}\n\n{"text": ""}\n{"text": "two\\n", "other": [1]}'


def read(folder: Path, **changes: object) -> tuple[list[Document], ReadCounts, Corpus]:
    corpus = Corpus(PrepareConfig(corpus=str(folder), **changes))  # type: ignore[arg-type]
    counts = ReadCounts()
    return [document for file in corpus.files for document in corpus.documents(file, counts)], counts, corpus


def write_parquet(path: Path, column: object, name: str = "text") -> None:
    parquet.write_table(pyarrow.table({name: column}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:17]) + gzip.compress(LINES[17:])),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.ZstdCompressor().compress(LINES[:20]) + zstandard.ZstdCompressor().compress(LINES[20:])
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_json_lines(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    documents, counts, _ = read(tmp_path)
    assert documents == [Document(name, 1, "one"), Document(name, 4, "two\n")]
    assert counts == ReadCounts(empty_documents=1)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path: Path, kind: object) -> None:
    write_parquet(tmp_path / "a.parquet", pyarrow.array(["one", None, "", "two"], type=kind))
    documents, counts, _ = read(tmp_path)
    assert documents == [Document("a.parquet", 0, "one"), Document("a.parquet", 3, "two")]
    assert counts.empty_documents == 2


def test_files_in_order_with_others_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.TXT", "a.md", "c.bin", "a/.hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\r\n")
    documents, _, corpus = read(tmp_path)
    assert [document.file for document in documents] == ["a/.hidden.txt", "a/z.TXT", "b.txt"]
    assert documents[2] == Document("b.txt", None, "b.txt\r\n")
    assert corpus.num_ignored == 2
    assert len(read(tmp_path, text_suffixes=(".txt", ".md"))[0]) == 4


def test_the_standard_library() -> None:
    corpus = Corpus(PrepareConfig())
    assert len(corpus.files) > 400
    assert all(file.endswith(".py") and "site-packages" not in file for file in corpus.files)
    assert corpus.num_ignored == 0


def test_undecodable_bytes_are_counted_by_file(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 \xff\xfe and a true \xef\xbf\xbd")
    (tmp_path / "good.txt").write_text("caf\u00e9")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "half \\ud83d pair"}')
    write_parquet(tmp_path / "p.parquet", pyarrow.array([b"x\xff"], type=pyarrow.binary()))
    documents, counts, _ = read(tmp_path)
    assert [document.text for document in documents] == [
        "caf\ufffd \ufffd\ufffd and a true \ufffd",
        "caf\u00e9",
        "a\ufffd",
        "half \ufffd pair",
        "x\ufffd",
    ]
    assert counts.undecodable == {"bad.txt": 3, "lines.jsonl": 2, "p.parquet": 1}


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "cut json": ("a.jsonl", LINES + b'\n{"text": "thr', r"a\.jsonl, line 5: not JSON .*; correct or remove the line"),
    "no field": ("a.jsonl", b'{"text": "one"}\n{"body": 1}', r'a\.jsonl, line 2: no text in field "text"'),
    "no object": ("a.jsonl", b"[1]", r'a\.jsonl, line 1: no text in field "text"'),
    "number": ("a.jsonl", b'{"text": 1}', r'a\.jsonl, line 1: no text in field "text"'),
    "deep json": ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-12], r"a\.jsonl\.gz, near line 1: damaged compression"),
    "no gzip": ("a.jsonl.gz", LINES, r"a\.jsonl\.gz, near line 1: damaged compression"),
    "cut zst": (
        "a.jsonl.zst",
        zstandard.ZstdCompressor().compress(LINES * 1000)[:-3],
        r"a\.jsonl\.zst, near line \d+: damaged compression \(the stream is cut off\); copy the file again",
    ),
    "no zst": ("a.jsonl.zst", LINES, r"a\.jsonl\.zst, near line 1: damaged compression"),
    "no parquet": ("a.parquet", LINES, r"a\.parquet, near record 0: damaged parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    name, data, message = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_flipped_gzip_byte_is_caught(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(json.dumps({"text": "x" * 50_000}).encode(), 0))
    data[20_000] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match="damaged compression"):
        read(tmp_path)


def test_a_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"{i}" * 50 for i in range(3000)])
    data = bytearray(path.read_bytes())
    data[20:400] = bytes(380)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet, near record \d+: damaged parquet"):
        read(tmp_path)


def test_parquet_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(UserError, match='column "text" holds int64, not text'):
        read(tmp_path)
    with pytest.raises(UserError, match='no column "body"'):
        read(tmp_path, text_field="body")


def test_folders_without_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"[^"]*/missing" is not a folder; give "stdlib" or a folder'):
        read(tmp_path / "missing")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no text: no file ends in .*\.txt \(1 files of other kinds are there\)"):
        read(tmp_path)


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_its_command(tmp_path: Path, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    code = f"""
import sys
sys.modules[{package!r}] = None
from headrace.data import PrepareConfig
from headrace.data.corpus import Corpus, ReadCounts
corpus = Corpus(PrepareConfig(corpus={str(tmp_path)!r}))
list(corpus.documents({name!r}, ReadCounts()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert f"{name} needs the package {package}; run: pip install {package}" in done.stderr


def test_held_out_is_a_function_of_path_and_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(2000)))
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text("text")
    documents, _, corpus = read(tmp_path, heldout_fraction=0.1)
    chosen = {(document.file, document.record) for document in documents if corpus.held_out(document)}
    assert 150 < sum(record is not None for _, record in chosen) < 250
    assert 12 < sum(record is None for _, record in chosen) < 50
    (tmp_path / "0.txt").write_text("other text, and fewer files")
    (tmp_path / "a.jsonl").unlink()
    documents, _, corpus = read(tmp_path, heldout_fraction=0.1)
    kept = {(document.file, document.record) for document in documents if corpus.held_out(document)}
    assert kept == {key for key in chosen if key[1] is None}
    assert not any(
        corpus.held_out(document) for corpus in [read(tmp_path, heldout_fraction=0)[2]] for document in documents
    )
