"""Layer patterns: words and counted groups, such as `4*(mamba2 mlp) attention mlp`."""

import re
from collections.abc import Collection
from difflib import get_close_matches

from ..errors import UserError

MAX_LAYERS = 10_000
MEGATRON_LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)\s*\*|(?P<word>[A-Za-z_]\w*)|(?P<open>\()|(?P<close>\)))")


def parse_pattern(pattern: str, kinds: Collection[str]) -> tuple[str, ...]:
    """The layers a pattern stands for, in order.

    Grammar: `item = [count "*"] (word | "(" item... ")")`; groups nest. Commas are not used.

    Raises:
        UserError: at an unknown layer (names the nearest), an unbalanced parenthesis, a count that counts nothing or
            is zero, an empty pattern, or more than MAX_LAYERS layers.
    """
    stack: list[list[str]] = [[]]
    counts: list[int] = []
    count: int | None = None
    position = 0
    text = pattern.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(pattern, f"cannot be read from {text[position:].strip()[:20]!r}")
        position = match.end()
        if match["count"]:
            if count is not None or int(match["count"]) == 0:
                raise _error(pattern, f"has a count of {match['count']}* that is zero or repeats another count")
            count = int(match["count"])
            continue
        if match["open"]:
            counts.append(count or 1)
            stack.append([])
        else:
            if match["close"]:
                if not counts:
                    raise _error(pattern, "closes a parenthesis that was never opened")
                layers, times = stack.pop(), counts.pop()
                if count is not None or not layers:
                    raise _error(pattern, "has a group or a count with nothing in it")
            else:
                layers, times = [_known(match["word"], kinds, pattern)], count or 1
            _extend(stack[-1], layers, times, pattern)
        count = None
    if counts or count is not None or not stack[0]:
        raise _error(pattern, "is empty, leaves a parenthesis open, or ends with a count")
    return tuple(stack[0])


def from_megatron(letters: str) -> str:
    """A pattern in words from Megatron-LM's letters: `M` mamba2, `*` attention, `-` mlp, `E` moe; runs are counted.

    Raises:
        UserError: for any other letter.
    """
    words: list[list] = []
    for letter in letters:
        if letter not in MEGATRON_LETTERS:
            known = ", ".join(f"{known} ({word})" for known, word in MEGATRON_LETTERS.items())
            raise UserError(f"pattern {letters!r}: unknown letter {letter!r}; use {known}")
        word = MEGATRON_LETTERS[letter]
        if words and words[-1][0] == word:
            words[-1][1] += 1
        else:
            words.append([word, 1])
    return " ".join(word if count == 1 else f"{count}*{word}" for word, count in words)


def _known(word: str, kinds: Collection[str], pattern: str) -> str:
    if word in kinds:
        return word
    nearest = get_close_matches(word, kinds, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "it must be one of those"
    raise _error(pattern, f"has the unknown layer {word!r} (known: {', '.join(sorted(kinds))}); {hint}")


def _extend(layers: list[str], more: list[str], times: int, pattern: str) -> None:
    if len(layers) + len(more) * times > MAX_LAYERS:
        raise _error(pattern, f"has more than {MAX_LAYERS} layers")
    layers.extend(more * times)


def _error(pattern: str, what: str) -> UserError:
    return UserError(f"pattern={pattern!r} {what}; write words and counted groups like '4*(mamba2 mlp) attention mlp'")
