"""A small corpus, prepared once, and datasets written document by document."""

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from headrace.data import PrepareConfig, TokenDataset, TokenizerConfig, prepare
from headrace.data.manifest import FORMAT, write_manifest
from headrace.data.shards import ShardWriter, hash_bytes

SMALL_TOKENIZER = TokenizerConfig(vocab_size=400, sample_bytes=100_000)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty text files in two folders, a few kilobytes each."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    for number, source in enumerate(sources):
        path = folder / f"part{number % 2}" / f"{source.stem}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source.read_text(encoding="utf-8")[:6000] or "empty\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_config(text_folder: Path) -> Callable[..., PrepareConfig]:
    """A PrepareConfig for the small corpus, with changes."""

    def make(out: Path, **changes: object) -> PrepareConfig:
        values = {"corpus": str(text_folder), "heldout_fraction": 0.1, "tokenizer": SMALL_TOKENIZER, **changes}
        return PrepareConfig(out=str(out), **values)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def prepared(small_config: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus, prepared; tests only read it."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(small_config(out))
    return out


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., TokenDataset]:
    """Writes documents (lists of ids) as the training split of a folder, and opens it."""

    def write(folder: Path, documents: Sequence[Sequence[int]], *, max_bytes: int, vocab_size: int) -> TokenDataset:
        dtype = "u16" if vocab_size <= 1 << 16 else "u32"
        writer = ShardWriter(folder / "train", dtype=dtype, max_bytes=max_bytes, tokenizer_hash="none")
        for document in documents:
            writer.add(document, len(document))
        shards = [entry.to_json() for entry in writer.close()]
        tokenizer = {"hash": "none", "vocab_size": vocab_size, "bos_id": 1, "eos_id": 2, "pad_id": 0}
        manifest = {
            "format": FORMAT,
            "inputs": {},
            "dtype": dtype,
            "tokenizer": tokenizer,
            "splits": {"train": {"shards": shards}, "heldout": {"shards": []}},
        }
        data = write_manifest(manifest)
        (folder / "manifest.json").write_bytes(data)
        dataset = TokenDataset(folder)
        assert dataset.fingerprint == hash_bytes(data)
        return dataset

    return write
