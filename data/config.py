"""What the user may choose about data: the keys of `headrace prepare`, and the table `[data]` of a run."""

from dataclasses import dataclass, field

STDLIB = "stdlib"
DEFAULT_FOLDER = "runs/data/stdlib-4096"
# Longest first: ".jsonl.gz" is not a ".gz".
RECORD_SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".jsonl", ".parquet")
PIECES = ("word", "mixed", "text")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer to train, or the one to use.

    Attributes:
        vocab_size: pieces; a run's `model.vocab_size` must be as large.
        pieces: what one may hold (bytes per token measured on Python source, 4,096 pieces): "word" a word or a run of
            punctuation or spaces (3.0), "mixed" words and the punctuation beside them (3.4), "text" anything, line ends
            and several words too (4.0). Longer pieces mean fewer tokens, and harder ones to predict.
        max_piece_length: characters.
        sample_bytes: of training text that pieces are learned from, about.
        path: of a sentencepiece model that takes the place of training; the other keys are then unused.
    """

    vocab_size: int = 4096
    pieces: str = "word"
    max_piece_length: int = 32
    sample_bytes: int = 8_000_000
    path: str | None = None

    def problems(self) -> list[str]:
        """All that is wrong with these values, one line each: value, rule, remedy."""
        found = []
        if not 300 <= self.vocab_size <= 1_000_000:
            found.append(
                f"tokenizer.vocab_size={self.vocab_size} is outside 300..1000000 "
                "(256 byte pieces and 4 control pieces are always there); use 4096 for a small model"
            )
        if self.pieces not in PIECES:
            found.append(f"tokenizer.pieces={self.pieces!r} is not one of {', '.join(PIECES)}; use word")
        if not 1 <= self.max_piece_length <= 128:
            found.append(f"tokenizer.max_piece_length={self.max_piece_length} is outside 1..128; use 32")
        if not 10_000 <= self.sample_bytes <= 1_000_000_000:
            found.append(f"tokenizer.sample_bytes={self.sample_bytes} is outside 10000..1000000000; use 8000000")
        return found


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a corpus becomes token shards.

    Attributes:
        corpus: "stdlib" (the source of Python's own standard library) or a folder of text, or of `.jsonl`, `.jsonl.gz`,
            `.jsonl.zst` and `.parquet` files with one document a record.
        out: the folder to write.
        text_suffixes: of files that are one document each.
        text_field: of a record, that holds the document.
        heldout_fraction: of the files (or records), that is kept for evaluation.
        shard_mib: MiB that a shard holds at most.
        seed: picks the tokenizer's sample.
        workers: threads that tokenise; the result does not depend on it.
    """

    corpus: str = STDLIB
    out: str = DEFAULT_FOLDER
    text_suffixes: tuple[str, ...] = (".txt",)
    text_field: str = "text"
    heldout_fraction: float = 0.02
    shard_mib: int = 64
    seed: int = 0
    workers: int = 2
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def problems(self) -> list[str]:
        """All that is wrong with these values, one line each: value, rule, remedy."""
        found = []
        if not self.corpus:
            found.append('corpus="" names nothing; use "stdlib" or a folder')
        if not self.out:
            found.append(f'out="" names nothing; use a folder, as {DEFAULT_FOLDER}')
        for suffix in self.text_suffixes:
            if not suffix.startswith(".") or suffix != suffix.lower() or suffix in RECORD_SUFFIXES:
                found.append(f'text_suffixes has "{suffix}"; write a lower-case suffix of plain text, as ".txt"')
        if not self.text_field:
            found.append('text_field="" names nothing; use the name of the field that holds the text, as "text"')
        if not 0 <= self.heldout_fraction <= 0.5:
            found.append(f"heldout_fraction={self.heldout_fraction} is outside 0..0.5; use 0.02")
        if not 1 <= self.shard_mib <= 4096:
            found.append(f"shard_mib={self.shard_mib} is outside 1..4096; use 64 to 256")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} is outside 0..2**63-1; use 0")
        if not 1 <= self.workers <= 1024:
            found.append(f"workers={self.workers} is outside 1..1024; use the number of free cores")
        return found + self.tokenizer.problems()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a training run reads.

    Attributes:
        folder: what `headrace prepare` wrote.
        seq_len: tokens of a row.
        seed: of the order of the documents.
        prefetch: batches that are made ready in a background thread.
    """

    folder: str = DEFAULT_FOLDER
    seq_len: int = 256
    seed: int = 0
    prefetch: int = 4

    def problems(self) -> list[str]:
        """All that is wrong with these values, one line each: value, rule, remedy."""
        found = []
        if not self.folder:
            found.append(f'data.folder="" names nothing; use what `headrace prepare` wrote, as {DEFAULT_FOLDER}')
        if self.seq_len < 1:
            found.append(f"data.seq_len={self.seq_len} is below 1; use a number of tokens, as 256")
        if not 0 <= self.seed < 2**63:
            found.append(f"data.seed={self.seed} is outside 0..2**63-1; use 0")
        if not 1 <= self.prefetch <= 1024:
            found.append(f"data.prefetch={self.prefetch} is outside 1..1024; use 4")
        return found
