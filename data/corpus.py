"""Reading a corpus: documents in a fixed order, one at a time, from files of several kinds."""

import gzip
import hashlib
import importlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import UserError
from .config import RECORD_SUFFIXES, STDLIB, PrepareConfig

_READ_BYTES = 1 << 20


class Document(NamedTuple):
    """A text, the file it came from (relative, with "/"), and its record in that file (None: the whole file)."""

    file: str
    record: int | None
    text: str


@dataclass
class ReadCounts:
    """What reading met: documents without text, and characters that replaced undecodable bytes, by file."""

    empty_documents: int = 0
    undecodable: dict[str, int] = field(default_factory=dict)

    def decode(self, data: bytes, file: str) -> str:
        """UTF-8 text of `data`; bytes that are none become U+FFFD and are counted."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            replaced = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
            self.undecodable[file] = self.undecodable.get(file, 0) + replaced
            return text


class Corpus:
    """The files of a corpus, sorted by path: `stdlib`, or the readable files below a folder.

    Raises UserError when the folder is missing or holds no file of a known kind.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        stdlib = config.corpus == STDLIB
        self.root = Path(sysconfig.get_paths()["stdlib"] if stdlib else config.corpus)
        self.name = f"the standard library of Python {platform.python_version()}" if stdlib else self.root.name
        if not self.root.is_dir():
            raise UserError(f'corpus "{config.corpus}" is not a folder; give "stdlib" or a folder with text files')
        suffixes = (".py",) if stdlib else (*RECORD_SUFFIXES, *config.text_suffixes)
        excluded = {"site-packages", "dist-packages"} if stdlib else set()
        try:
            self.sizes, ignored_files = _list_files(self.root, suffixes, excluded)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; correct its permissions") from None
        self.files = sorted(self.sizes)
        # The standard library is its Python files by definition; what else lies there is nobody's mistake.
        self.num_ignored = 0 if stdlib else ignored_files
        if not self.files:
            ignored = f" ({self.num_ignored} files of other kinds are there)" if self.num_ignored else ""
            raise UserError(
                f"corpus {self.root} holds no text: no file ends in {', '.join(suffixes)}{ignored}; "
                "give another folder, or name the suffix in text_suffixes"
            )

    def listing_hash(self) -> str:
        """A hash of all file names and sizes: it tells another corpus, or a changed one, without reading it."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(f"{file}\0{self.sizes[file]}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def documents(self, file: str, counts: ReadCounts) -> Iterator[Document]:
        """The documents of one file that have text, in order.

        Raises UserError, naming the file and the line or record, for what cannot be read.
        """
        suffix = next((kind for kind in RECORD_SUFFIXES if file.lower().endswith(kind)), None)
        try:
            if suffix is None:
                texts: Iterator[tuple[int | None, str]] = iter([(None, self._whole(file, counts))])
            elif suffix == ".parquet":
                texts = self._parquet(file, counts)
            else:
                texts = self._jsonl(file, suffix, counts)
            for record, text in texts:
                if text:
                    yield Document(file, record, _without_surrogates(text, file, counts))
                else:
                    counts.empty_documents += 1
        except OSError as error:
            raise UserError(f"cannot read {self.root / file}: {error.strerror or error}") from None

    def held_out(self, document: Document) -> bool:
        """Whether a document is kept for evaluation: a function of its path, and of its record where it has one."""
        key = document.file if document.record is None else f"{document.file}\0{document.record}"
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.config.heldout_fraction * 2**64

    def _whole(self, file: str, counts: ReadCounts) -> str:
        return counts.decode((self.root / file).read_bytes(), file)

    def _jsonl(self, file: str, suffix: str, counts: ReadCounts) -> Iterator[tuple[int, str]]:
        path = self.root / file
        number = 0
        with path.open("rb") as stream:
            lines = _lines(_OPENERS[suffix](stream))
            while True:
                number += 1
                try:
                    line = next(lines, None)
                except (EOFError, zlib.error, gzip.BadGzipFile, _BadFrameError) as error:
                    raise UserError(f"{path}, near line {number}: damaged compression ({error}); {_REPLACE}") from None
                if line is None:
                    return
                if line.strip():
                    yield number, self._field(_parse(line, f"{path}, line {number}", file, counts), path, number)

    def _field(self, record: Any, path: Path, number: int) -> str:
        name = self.config.text_field
        text = record.get(name) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'{path}, line {number}: no text in field "{name}"; correct the line, or name the field in text_field'
            )
        return text

    def _parquet(self, file: str, counts: ReadCounts) -> Iterator[tuple[int, str]]:
        parquet = _import("pyarrow.parquet", "pyarrow", file)
        arrow = _import("pyarrow", "pyarrow", file)
        path, name = self.root / file, self.config.text_field
        number = 0
        try:
            with parquet.ParquetFile(path) as table:
                if name not in table.schema_arrow.names:
                    raise UserError(f'{path}: no column "{name}"; name the column that holds the text in text_field')
                kind = table.schema_arrow.field(name).type
                if kind not in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
                    raise UserError(f'{path}: column "{name}" holds {kind}, not text; name another in text_field')
                for batch in table.iter_batches(batch_size=256, columns=[name]):
                    # As bytes: Arrow's own conversion to text fails as a whole where one byte is not UTF-8.
                    for data in batch.column(0).cast(arrow.large_binary()).to_pylist():
                        yield number, counts.decode(data or b"", file)
                        number += 1
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}, near record {number}: damaged parquet ({reason}); {_REPLACE}") from None


def _list_files(root: Path, suffixes: tuple[str, ...], excluded: set[str]) -> tuple[dict[str, int], int]:
    """Sizes of the files below `root` that end in one of `suffixes`, by relative path, and the number of others."""
    sizes, num_others = {}, 0
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        for name in names:
            path = Path(folder, name)
            if name.lower().endswith(suffixes) and path.is_file():
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            else:
                num_others += 1
    return sizes, num_others


def _raise(error: OSError) -> None:
    raise error


_REPLACE = "copy the file again or remove it"


class _BadFrameError(Exception):
    """A Zstandard stream that is damaged or cut off."""


def _import(module: str, package: str, file: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{file} needs the package {package}; run: pip install {package}") from None


def _parse(line: bytes, where: str, file: str, counts: ReadCounts) -> Any:
    try:
        return json.loads(counts.decode(line, file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); correct or remove the line") from None


def _without_surrogates(text: str, file: str, counts: ReadCounts) -> str:
    """JSON may spell half a surrogate pair, which no UTF-8 text can hold: counted as undecodable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        clean = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
        counts.undecodable[file] = counts.undecodable.get(file, 0) + sum(map(str.__ne__, clean, text))
        return clean
    return text


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines (at "\\n" only) of a stream of chunks."""
    rest: list[bytes] = []
    for chunk in chunks:
        *complete, tail = chunk.split(b"\n")
        for line in complete:
            yield b"".join(rest) + line
            rest.clear()
        rest.append(tail)
    if any(rest):
        yield b"".join(rest)


def _plain_chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_READ_BYTES):
        yield chunk


def _gzip_chunks(stream: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as unpacked:
        yield from _plain_chunks(unpacked)  # type: ignore[arg-type]


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # The library's own reader ends without an error where a stream is cut off, so frames are followed here.
    zstandard = _import("zstandard", "zstandard", stream.name)
    frame = None
    for chunk in _plain_chunks(stream):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _BadFrameError(str(error)) from None
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _BadFrameError("the stream is cut off")


_OPENERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".jsonl": _plain_chunks,
    ".jsonl.gz": _gzip_chunks,
    ".jsonl.zst": _zstd_chunks,
}
