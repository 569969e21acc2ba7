"""The tokenizer gives back what it was given, and is the same every time."""

import random
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import UserError
from headrace.data import Tokenizer
from headrace.data.config import PIECES
from headrace.data.tokenizer import SPAN_CHARACTERS

SPECIMENS = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "\tif x:\r\n\t\treturn\r",
    "\x00\x01\x7f nul \x00",
    "<s></s><pad><unk><0x41>",
    "naïve 😀 漢字 \u0301 \ufeff \u2028 \ufffd \u2585",
    " " * 1000 + "x" + "\n" * 1000,
    "\t" * 50,
    "\u00a0\u3000 no-break and ideographic spaces",
]


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared)


@pytest.fixture(scope="module")
def trained(text_folder: Path) -> dict[str, Tokenizer]:
    """A tokenizer of each kind of pieces."""
    texts = [path.read_text() for path in sorted(text_folder.rglob("*.txt"))]
    return {kind: Tokenizer.train(texts, vocab_size=1000, max_piece_length=8, pieces=kind) for kind in PIECES}


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("text", SPECIMENS)
def test_specimens_come_back(trained: dict[str, Tokenizer], text: str, kind: str) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.processor.unk_id()}.intersection(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back(text: str, prepared: Path) -> None:
    tokenizer = _loaded(prepared)
    assert tokenizer.decode(tokenizer.encode(text)) == text


_LOADED: dict[Path, Tokenizer] = {}


def _loaded(folder: Path) -> Tokenizer:
    if folder not in _LOADED:
        _LOADED[folder] = Tokenizer.load(folder)
    return _LOADED[folder]


def test_the_one_character_that_does_not_come_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_controls_and_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.vocab_size == 400
    ids = tokenizer.encode("import os\n")
    assert tokenizer.decode([1, *ids, 2, 3]) == "import os\n"


def test_what_pieces_hold(trained: dict[str, Tokenizer]) -> None:
    pieces = {kind: [t.processor.id_to_piece(i) for i in range(260, 1000)] for kind, t in trained.items()}
    line_ends = {kind: [piece for piece in found if "\n" in piece] for kind, found in pieces.items()}
    assert line_ends["word"] == line_ends["mixed"] == []
    assert trained["word"].processor.id_to_piece(4) == "\n"
    assert len(line_ends["text"]) > 10
    joined = {kind: any(re.fullmatch(r"[a-z]+[.(]", piece) for piece in found) for kind, found in pieces.items()}
    assert joined == {"word": False, "mixed": True, "text": True}
    text = "    for name in names:\n        self.value = None\n"
    lengths = [len(trained[kind].encode(text)) for kind in PIECES]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2]


@pytest.mark.parametrize("character", ["\t", "\r", "\0", "\u2585", "\u2028", "<s>"])
def test_no_character_spoils_a_text_for_training(character: str) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice([*"abcdefgh ", character]) for _ in range(1000)) for _ in range(20)]
    tokenizer = Tokenizer.train(texts, vocab_size=300, max_piece_length=8, pieces="text")
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_training_is_deterministic(tokenizer: Tokenizer, text_folder: Path) -> None:
    texts = [path.read_text() for path in sorted(text_folder.rglob("*.txt"))[:20]]
    first, second = (Tokenizer.train(texts, vocab_size=1000, max_piece_length=8, pieces="word") for _ in range(2))
    assert first.model == second.model
    assert first.hash == second.hash != tokenizer.hash
    assert max(len(first.processor.id_to_piece(i)) for i in range(260, 1000)) == 8


def test_a_long_text_is_encoded_in_spans(tokenizer: Tokenizer) -> None:
    lines = "value = 1  # a line\n" * (SPAN_CHARACTERS // 20 + 10)
    unbroken = "x" * (2 * SPAN_CHARACTERS + 5)
    ids = tokenizer.encode_batch([lines, "short", unbroken, ""], threads=2)
    assert [tokenizer.decode(each) for each in ids] == [lines, "short", unbroken, ""]
    assert ids == tokenizer.encode_batch([lines, "short", unbroken, ""], threads=1)
    assert ids[1] == tokenizer.encode("short")


def test_files_that_are_no_tokenizer(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*nothing: No such file"):
        Tokenizer.load(tmp_path / "nothing")
    junk = tmp_path / "junk.model"
    for data in (b"", b"this is no model", (prepared / "tokenizer.model").read_bytes()[:500]):
        junk.write_bytes(data)
        with pytest.raises(UserError, match=r"junk\.model is not a sentencepiece model"):
            Tokenizer.load(junk)


def test_a_model_without_bos_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to learn from"] * 10),
            model_writer=stream,
            vocab_size=30,
            model_type="bpe",
            bos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(UserError, match="has no BOS or no EOS"):
        Tokenizer.load(path)


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"no tokenizer of 4096 pieces .* use a smaller tokenizer\.vocab_size"):
        Tokenizer.train(["a few words"], vocab_size=4096, max_piece_length=16, pieces="word")
