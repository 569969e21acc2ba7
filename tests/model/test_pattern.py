"""Patterns: expansion against a second reading of the grammar, and one clear line for each mistake."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.model.pattern import MEGATRON_LETTERS, from_megatron, parse_pattern

KINDS = ("mamba2", "attention", "sliding_attention", "mlp", "moe")

# (text, layers) pairs grown together, so that the expansion is known without the parser.
ITEMS = st.recursive(
    st.sampled_from(KINDS).map(lambda word: (word, [word])),
    lambda inner: st.builds(
        lambda group, count, space: (
            f"{count}{space}*{space}({space}{' '.join(text for text, _ in group)}{space})",
            [layer for _, layers in group for layer in layers] * count,
        ),
        st.lists(inner, min_size=1, max_size=3),
        st.integers(1, 3),
        st.sampled_from(["", " "]),
    ),
    max_leaves=6,
)


@given(st.lists(ITEMS, min_size=1, max_size=4))
def test_expansion(items: list[tuple[str, list[str]]]) -> None:
    text = " ".join(text for text, _ in items)
    assert parse_pattern(text, KINDS) == tuple(layer for _, layers in items for layer in layers)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("7*mamba2 attention mlp", ("mamba2",) * 7 + ("attention", "mlp")),
        ("2*(mamba2 2*(mlp)) (attention)", ("mamba2", "mlp", "mlp", "mamba2", "mlp", "mlp", "attention")),
        ("2*(mamba2)mlp", ("mamba2", "mamba2", "mlp")),
    ],
)
def test_examples(pattern: str, expected: tuple[str, ...]) -> None:
    assert parse_pattern(pattern, KINDS) == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("mamba2 atention", "did you mean 'attention'"),
        ("mamba3", "did you mean 'mamba2'"),
        ("xyz", "known: attention, mamba2, mlp"),
        ("", "empty"),
        ("2*(mamba2", "parenthesis open"),
        ("mamba2)", "never opened"),
        ("2*", "ends with a count"),
        ("()", "nothing in it"),
        ("(2*)", "nothing in it"),
        ("0*mamba2", "zero"),
        ("2*3*mamba2", "repeats another count"),
        ("mamba2, mlp", "cannot be read from ', mlp'"),
        ("2 mamba2", "cannot be read"),
        ("100000*mamba2", "more than 10000 layers"),
        ("9999*(9999*(9999*(9999*mamba2)))", "more than 10000 layers"),
    ],
)
def test_mistakes(pattern: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pattern(pattern, KINDS)
    assert words in str(error.value)
    assert repr(pattern) in str(error.value)


@given(st.text("M*-E", min_size=1, max_size=60))
def test_megatron_letters(letters: str) -> None:
    assert parse_pattern(from_megatron(letters), KINDS) == tuple(MEGATRON_LETTERS[letter] for letter in letters)


@pytest.mark.parametrize(("letters", "words"), [("MG", "unknown letter 'G'"), ("M+", "E (moe)")])
def test_megatron_mistakes(letters: str, words: str) -> None:
    with pytest.raises(UserError, match="pattern"):
        from_megatron(letters)
    with pytest.raises(UserError) as error:
        from_megatron(letters)
    assert words in str(error.value)
