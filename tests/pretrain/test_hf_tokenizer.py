"""The exported tokenizer.json gives sentencepiece's ids and text, for trained models and for made-up ones."""

import io
import itertools
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.data import Tokenizer
from headrace.errors import UserError
from headrace.pretrain.hf.spm_model import read_spm_model
from headrace.pretrain.hf.tokenizer import convert_tokenizer

transformers = pytest.importorskip("transformers")

EXACT = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}
SETTINGS = {
    "headrace prepare": None,
    "newline learned": {},
    "newline user-defined": {"user_defined_symbols": ["\n", "\t", "<|end|>"]},
    "other special ids": {"bos_id": 0, "eos_id": 1, "unk_id": 2, "pad_id": 3},
}


def corpus() -> list[str]:
    library = Path(json.__file__).parent
    code = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    pieces = [text[i : i + 1000] for text in code for i in range(0, len(text), 1000)]
    return [*pieces, *["ababab abab aaaaaaaaaa aaaa\n\n\n\tcafé 漢字 naïve ====== ------\n"] * 100]


def train(path: Path, **options) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        **{"vocab_size": 700, "minloglevel": 2, "hard_vocab_limit": False, **EXACT, **options},
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module", params=list(SETTINGS))
def both(request, tmp_path_factory):
    """A sentencepiece processor and the stock tokenizer of the same model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    options = SETTINGS[request.param]
    if options is None:
        model = Tokenizer.train(corpus(), vocab_size=700, max_piece_length=16).model
        (folder / "tokenizer.model").write_bytes(model)
    else:
        train(folder / "tokenizer.model", **options)
    (folder / "hf").mkdir()
    convert_tokenizer(folder / "tokenizer.model", folder / "hf")
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return spm, transformers.AutoTokenizer.from_pretrained(folder / "hf")


def check_same(spm, stock, text: str) -> None:
    ids = spm.encode(text)
    assert stock(text, add_special_tokens=False)["input_ids"] == ids
    assert stock(text)["input_ids"] == [spm.bos_id(), *ids]
    assert stock.decode(ids) == spm.decode(ids)
    assert stock.decode([spm.bos_id(), *ids, spm.eos_id()], skip_special_tokens=True) == spm.decode(ids)


FRAGMENTS = ["<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|end|>", "\u2581", "\n", "\n\n\n", "\t", "\r\n", " ", "    "]
FRAGMENTS += [
    "        ",
    "def ",
    "self.",
    "import json",
    "ab",
    "aaa",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "漢字",
    "\0",
    "\x7f",
    "\ufeff",
    "1234",
]
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.characters(exclude_categories=["Cs"])), max_size=25).map("".join),
    st.builds(
        lambda c, n, end: c * n + end, st.sampled_from(" a-=\n#é"), st.integers(1, 90), st.sampled_from(["", "x", " "])
    ),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_any_text_gives_the_ids_and_the_text_of_sentencepiece(both, text):
    check_same(*both, text)


def test_empty_text_special_looking_text_and_a_whole_file(both):
    spm, stock = both
    for text in ["", "<s>", "</s><s>", "a<unk>b", "\u2581\u2581x", Path(json.__file__).read_text(encoding="utf-8")]:
        check_same(spm, stock, text)
    text = "<s>x = 1\n"
    assert stock.decode(stock(text, add_special_tokens=False)["input_ids"]) == text


def test_stock_tokenizer_knows_its_special_tokens_and_its_model_inputs(both):
    spm, stock = both
    assert (stock.bos_token_id, stock.eos_token_id, stock.unk_token_id) == (spm.bos_id(), spm.eos_id(), spm.unk_id())
    assert stock.pad_token_id == (spm.pad_id() if spm.pad_id() >= 0 else spm.eos_id())
    assert len(stock) == spm.vocab_size()
    assert set(stock("text")) == {"input_ids", "attention_mask"}
    assert stock("a", "b")["input_ids"] == [spm.bos_id(), *spm.encode("a"), spm.bos_id(), *spm.encode("b")]


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def made_up_model(words: list[str]) -> bytes:
    """A BPE model whose merges are `words` in order of rank, over the letters a and b."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate([*words, "a", "b"])]
    message = b"".join(field(1, field(1, t.encode()) + field(2, score) + field(3, kind)) for t, score, kind in pieces)
    return message + field(2, field(3, 2) + field(35, 1)) + field(3, field(1, b"identity") + field(3, 0) + field(4, 0))


@pytest.mark.parametrize("seed", range(3))
def test_made_up_merge_orders_agree_too(seed, tmp_path):
    """Trained models grow piece by piece; these have merges in any order and words that overlap themselves."""
    import tokenizers

    rng = random.Random(seed)
    words = ["".join(word) for length in range(2, 6) for word in itertools.product("ab", repeat=length)]
    for _ in range(15):
        data = made_up_model(rng.sample(words, rng.randint(3, 20)))
        (tmp_path / "tokenizer.model").write_bytes(data)
        convert_tokenizer(tmp_path / "tokenizer.model", tmp_path)
        stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        spm = sentencepiece.SentencePieceProcessor(model_proto=data)
        for _ in range(60):
            text = "".join(rng.choice("ab") * rng.choice([1, 1, 2, 3]) for _ in range(rng.randint(0, 25)))
            assert stock.encode(text, add_special_tokens=False).ids == spm.encode(text), text


def test_reader_agrees_with_sentencepiece(tmp_path):
    train(tmp_path / "tokenizer.model", pad_id=3, user_defined_symbols=["\n"])
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    model = read_spm_model(tmp_path / "tokenizer.model")
    assert [piece.text for piece in model.pieces] == [spm.id_to_piece(i) for i in range(spm.vocab_size())]
    assert [piece.score for piece in model.pieces] == [spm.get_score(i) for i in range(spm.vocab_size())]
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (0, 1, 2, 3)
    assert (model.algorithm, model.normalizer, model.byte_fallback) == ("bpe", "identity", True)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.has_charsmap) == (False, False, False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "model type unigram"),
        ({"normalization_rule_name": "nfkc"}, "normalisation nfkc"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "normalisation nmt_nfkc_cf"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"remove_extra_whitespaces": True}, "spaces are removed"),
        ({"bos_id": -1}, "no bos piece"),
        ({"user_defined_symbols": ["a b"]}, "holds a space"),
        ({"user_defined_symbols": ["/s"]}, "overlaps a special token"),
    ],
)
def test_a_model_without_an_exact_equal_is_refused_with_the_reason(options, reason, tmp_path):
    train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=reason):
        convert_tokenizer(tmp_path / "tokenizer.model", tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff", b"\x0f\x01", b"\xff" * 20])
def test_a_file_that_is_no_model_is_a_user_error(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a sentencepiece model"):
        read_spm_model(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="cannot be read"):
        read_spm_model(tmp_path / "missing.model")


def test_loads_with_no_sentencepiece_and_no_network(tmp_path):
    train(tmp_path / "tokenizer.model")
    convert_tokenizer(tmp_path / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "print(tokenizer.decode(tokenizer('x = 1')['input_ids']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": ""},
        check=False,
    )
    assert done.stdout == "<s>x = 1\n", done.stderr
