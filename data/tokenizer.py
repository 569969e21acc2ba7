"""The tokenizer: a sentencepiece model, trained here on a sample of the corpus or given by the user."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from ..errors import UserError, file_error

# Longer texts are encoded in spans, cut at a line end: the encoder's memory and time grow faster than the text.
SPAN_CHARACTERS = 1 << 20
# Raised whenever `train` would make another model of the same texts, so that prepared data is not taken for new.
RECIPE = 2
# The trainer marks unknown characters with this one, and passes over every text that holds it.
_UNKNOWN_MARK = "\u2585"


class Tokenizer:
    """Text to token ids and back; immutable, known by the `hash` of its model's bytes.

    A model trained here gives every text back unchanged, with one exception: U+2581, which sentencepiece uses for the
    space, comes back as a space. Text that spells a control piece, such as "<s>", stays text.
    """

    def __init__(self, model: bytes, *, name: str) -> None:
        self.model = model
        self.hash = hashlib.blake2b(model, digest_size=16).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self.processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"{name} is not a sentencepiece model; give the file tokenizer.model")
        self.vocab_size = int(self.processor.get_piece_size())
        self.bos_id = int(self.processor.bos_id())
        self.eos_id = int(self.processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name} has no BOS or no EOS piece; train it with both (bos_id, eos_id)")
        pad_id = int(self.processor.pad_id())
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a sentencepiece model from a file, or from `tokenizer.model` in a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        try:
            model = path.read_bytes()
        except OSError as error:
            raise file_error(f"cannot read the tokenizer {path}: {error.strerror}", error) from None
        return cls(model, name=str(path))

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, max_piece_length: int, pieces: str = "word"
    ) -> "Tokenizer":
        """Learns a byte-pair encoding from `texts`; the same texts give the same bytes.

        Normalisation is the identity and unknown characters become bytes. `pieces` says what a piece may span (see
        `TokenizerConfig`). Ids: unknown 0, BOS 1, EOS 2, padding 3, the line end 4 unless pieces span it, then the
        256 bytes, then pieces from the most useful.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text.replace(_UNKNOWN_MARK, " ") for text in texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                max_sentencepiece_length=max_piece_length,
                max_sentence_length=1 << 24,
                normalization_rule_name="identity",
                byte_fallback=True,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_by_whitespace=pieces != "text",
                split_by_unicode_script=pieces == "word",
                user_defined_symbols=[] if pieces == "text" else ["\n"],
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                # The number of threads is written into the model: a fixed one keeps its bytes the same everywhere.
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"no tokenizer of {vocab_size} pieces could be trained on this corpus ({_reason(error)}); "
                "use a smaller tokenizer.vocab_size or more text"
            ) from None
        return cls(model.getvalue(), name="the trained tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS; the result does not depend on `threads`."""
        spans = [list(_spans(text)) for text in texts]
        encoded = iter(self.processor.encode([span for each in spans for span in each], num_threads=threads))
        return [[token for _ in each for token in next(encoded)] for each in spans]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control pieces (BOS, EOS, padding) give nothing."""
        return str(self.processor.decode([int(token) for token in ids]))


def _spans(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > SPAN_CHARACTERS:
        end = text.rfind("\n", start, start + SPAN_CHARACTERS) + 1 or start + SPAN_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _reason(error: RuntimeError) -> str:
    """The last line of sentencepiece's message, without the place in its source."""
    return str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1] or "no reason given"
