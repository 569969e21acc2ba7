"""`headrace prepare`: from a corpus to a tokenizer and token shards, written aside and made visible by one rename."""

import errno
import gzip
import heapq
import json
import lzma
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .config import PrepareConfig
from .corpus import Corpus, Document, ReadCounts
from .dataset import TokenDataset, check_tokenizer
from .manifest import FORMAT, MANIFEST, SPLITS, TOKENIZER, read_manifest, write_manifest
from .shards import ShardWriter, write_file
from .tokenizer import RECIPE, Tokenizer

PIECE_CHARACTERS = 1000
# The tokenizer's sample is drawn from at most this much text: a corpus of terabytes is not read twice.
SCAN_BYTES = 1 << 29
BATCH_CHARACTERS = 1 << 22
BASELINE_BYTES = 64 << 20
LISTED_FILES = 100
SAY_EVERY_S = 2

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote, or found already there (`reused`): the folder, the seconds it took, its manifest.

    `corpus` names the corpus; `num_ignored` counts its files of other kinds.
    """

    out: Path
    corpus: str
    num_ignored: int
    reused: bool
    seconds: float
    manifest: dict[str, Any]
    fingerprint: str

    def bits_per_byte(self, program: str) -> float | None:
        """Compressed bits per held-out byte of "gzip" (-9) or "xz" (-9); None where it was not measured."""
        heldout = self.manifest["splits"]["heldout"]
        size = heldout.get(f"{program}_bytes")
        return None if size is None or not heldout["text_bytes"] else 8 * size / heldout["text_bytes"]

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        corpus, splits = self.manifest["corpus"], self.manifest["splits"]
        ignored = f", {self.num_ignored} files of other kinds ignored" if self.num_ignored else ""
        text = [f"corpus: {self.corpus}, {corpus['num_files']} files{ignored}"]
        for name in SPLITS:
            part = splits[name]
            if part["num_tokens"]:
                rate = part["text_bytes"] / (part["num_tokens"] - 2 * part["num_documents"])
                text.append(
                    f"{name}: {part['num_documents']} documents, {part['num_tokens']} tokens, "
                    f"{part['text_bytes'] / 1e6:.2f} MB, {rate:.3f} bytes per token, {len(part['shards'])} shards"
                )
            else:
                text.append(f"{name}: empty; raise heldout_fraction to measure on text that was not trained on")
        if corpus["empty_documents"]:
            text.append(f"empty documents skipped: {corpus['empty_documents']}")
        if corpus["undecodable_characters"]:
            text.append(
                f"undecodable characters replaced by U+FFFD: {corpus['undecodable_characters']} "
                f"in {corpus['undecodable_files']} files, as {next(iter(corpus['undecodable']))}"
            )
        for program in ("gzip", "xz"):
            if (rate := self.bits_per_byte(program)) is not None:
                text.append(f"held-out text under {program} -9: {rate:.3f} bits per byte")
        text.append(f"{self.out}: {'already there' if self.reused else 'written'} in {self.seconds:.1f} s")
        return text


def prepare(config: PrepareConfig, *, say: Say = lambda line: None) -> PrepareReport:
    """Makes `config.out` from the corpus: tokenizer, manifest, and the shards of both splits.

    Nothing is visible at `out` before all of it is there. A finished folder made from the same inputs is left alone;
    one made from others is refused. `say` gets progress lines. Raises UserError for whatever the user can put right.
    """
    started = time.perf_counter()
    if found := config.problems():
        raise UserError("; ".join(found))
    out = Path(config.out)
    given = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    corpus = Corpus(config)
    inputs = _inputs(config, corpus, given)
    reused = out.exists() and bool(_check_finished(out, inputs))
    if not reused:
        aside = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
        try:
            _write_folder(aside, config, corpus, given, inputs, say)
            os.rename(aside, out)
            _sync_folder(out.parent)
        except OSError as error:
            raise UserError(_disk_message(error, out)) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    manifest = read_manifest(out)
    return PrepareReport(
        out=out,
        corpus=corpus.name,
        num_ignored=corpus.num_ignored,
        reused=reused,
        seconds=time.perf_counter() - started,
        manifest=dict(manifest.values),
        fingerprint=manifest.fingerprint,
    )


def _inputs(config: PrepareConfig, corpus: Corpus, given: Tokenizer | None) -> dict[str, Any]:
    """All that the result depends on, as the manifest holds it."""
    settings = asdict(config)
    for name in ("corpus", "out", "workers"):
        del settings[name]
    settings["tokenizer"] = {"hash": given.hash} if given else settings["tokenizer"] | {"recipe": RECIPE}
    settings["corpus_listing"] = corpus.listing_hash()
    return json.loads(json.dumps(settings))


def _check_finished(out: Path, inputs: dict[str, Any]) -> bool:
    """True when `out` was made from `inputs`; UserError when something else is there."""
    if not (out / MANIFEST).exists():
        raise UserError(f"{out} exists and holds no prepared data; choose another out, or remove it")
    there = read_manifest(out)
    before, now = _flatten(there.values["inputs"]), _flatten(inputs)
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if different:
        raise UserError(
            f"{out} was prepared from other inputs (different: {', '.join(different)}); "
            "choose another out, or remove that folder to prepare it again"
        )
    for split in SPLITS:
        if there.shards[split]:
            check_tokenizer(TokenDataset(out, split), Tokenizer.load(out))
    return True


def _flatten(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with one level: {"tokenizer": {"pieces": x}} becomes {"tokenizer.pieces": x}."""
    tokenizer = {f"tokenizer.{name}": value for name, value in inputs["tokenizer"].items()}
    return {name: value for name, value in inputs.items() if name != "tokenizer"} | tokenizer


def _write_folder(
    aside: Path, config: PrepareConfig, corpus: Corpus, given: Tokenizer | None, inputs: dict[str, Any], say: Say
) -> None:
    aside.mkdir(parents=True)
    tokenizer = given or _train_tokenizer(config, corpus, say)
    write_file(aside / TOKENIZER, tokenizer.model)
    counts = ReadCounts()
    splits = _tokenize(aside, config, corpus, tokenizer, counts, say)
    worst = sorted(counts.undecodable.items(), key=lambda item: (-item[1], item[0]))
    manifest = {
        "format": FORMAT,
        "inputs": inputs,
        "dtype": _dtype(tokenizer),
        "tokenizer": {
            "file": TOKENIZER,
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "corpus": {
            "num_files": len(corpus.files),
            "empty_documents": counts.empty_documents,
            "undecodable_characters": sum(counts.undecodable.values()),
            "undecodable_files": len(worst),
            "undecodable": dict(worst[:LISTED_FILES]),
        },
        "splits": splits,
    }
    write_file(aside / MANIFEST, write_manifest(manifest))
    _sync_folder(aside)


def _train_tokenizer(config: PrepareConfig, corpus: Corpus, say: Say) -> Tokenizer:
    sample = _sample(config, corpus)
    say(f"training a tokenizer of {config.tokenizer.vocab_size} pieces on {len(sample)} pieces of text")
    return Tokenizer.train(
        sample,
        vocab_size=config.tokenizer.vocab_size,
        max_piece_length=config.tokenizer.max_piece_length,
        pieces=config.tokenizer.pieces,
    )


def _sample(config: PrepareConfig, corpus: Corpus) -> list[str]:
    """A uniform random sample of stretches of the training documents, about `sample_bytes` bytes in all."""
    draw = random.Random(config.seed)
    files = list(corpus.files)
    draw.shuffle(files)
    kept: list[tuple[float, int, str]] = []
    number = kept_bytes = scanned_bytes = 0
    for file in files:
        for document in corpus.documents(file, ReadCounts()):
            if corpus.held_out(document):
                continue
            for start in range(0, len(document.text), PIECE_CHARACTERS):
                piece = document.text[start : start + PIECE_CHARACTERS]
                size = len(piece.encode())
                # The largest of the random marks leaves first: what stays is a uniform sample of all seen.
                heapq.heappush(kept, (-draw.random(), number, piece))
                number += 1
                kept_bytes += size
                scanned_bytes += size
                while kept_bytes > config.tokenizer.sample_bytes and len(kept) > 1:
                    kept_bytes -= len(heapq.heappop(kept)[2].encode())
        if scanned_bytes > SCAN_BYTES:
            break
    if not kept:
        raise UserError(f"corpus {corpus.root} leaves no text to train on; give more text or lower heldout_fraction")
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def _dtype(tokenizer: Tokenizer) -> str:
    return "u16" if tokenizer.vocab_size <= 1 << 16 else "u32"


def _batches(corpus: Corpus, counts: ReadCounts) -> Iterator[list[Document]]:
    """Documents of the whole corpus, in lists of a few megabytes."""
    batch: list[Document] = []
    size = 0
    for file in corpus.files:
        for document in corpus.documents(file, counts):
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    aside: Path, config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer, counts: ReadCounts, say: Say
) -> dict[str, dict[str, Any]]:
    options: dict[str, Any] = {
        "dtype": _dtype(tokenizer),
        "max_bytes": config.shard_mib << 20,
        "tokenizer_hash": tokenizer.hash,
    }
    writers = {split: ShardWriter(aside / split, **options) for split in SPLITS}
    baseline = Baseline()
    done, said = 0, time.monotonic()
    try:
        for batch in _batches(corpus, counts):
            encoded = tokenizer.encode_batch([document.text for document in batch], threads=config.workers)
            for document, ids in zip(batch, encoded, strict=True):
                text = document.text.encode()
                held_out = corpus.held_out(document)
                writers["heldout" if held_out else "train"].add([tokenizer.bos_id, *ids, tokenizer.eos_id], len(text))
                if held_out:
                    baseline.add(text)
                done += len(text)
            if time.monotonic() > said + SAY_EVERY_S:
                said = time.monotonic()
                say(f"tokenised {done / 1e6:.0f} MB")
        entries = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    if not entries["train"]:
        raise UserError(f"corpus {corpus.root} leaves no text to train on; give more text or lower heldout_fraction")
    splits: dict[str, dict[str, Any]] = {}
    for split, shards in entries.items():
        _sync_folder(aside / split)
        splits[split] = {
            "shards": [shard.to_json() for shard in shards],
            **{name: sum(getattr(shard, name) for shard in shards) for name in _TOTALS},
        }
    splits["heldout"] |= baseline.sizes()
    return splits


_TOTALS = ("num_documents", "num_tokens", "text_bytes")


class Baseline:
    """What gzip -9 and xz -9 make of the held-out text, so that a model's bits per byte have something beside them."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.size = 0

    def add(self, text: bytes) -> None:
        """Appends a document; past 64 MiB nothing is kept and nothing will be measured."""
        self.size += len(text)
        if self.size <= BASELINE_BYTES:
            self.texts.append(text)
        else:
            self.texts.clear()

    def sizes(self) -> dict[str, int]:
        """`gzip_bytes`, `xz_bytes` and the sum of the text; empty when there is no text or too much."""
        if not self.texts:
            return {}
        text = b"".join(self.texts)
        return {
            "gzip_bytes": len(gzip.compress(text, 9, mtime=0)),
            "xz_bytes": len(lzma.compress(text, preset=9)),
        }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_message(error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {out} was not written, nothing is left of it; free some space or choose another out"
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return f"{out} was made by another process in the meantime; run the command again"
    return f"cannot write {out}: {error.strerror or error}; choose another out"
