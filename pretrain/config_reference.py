"""Every key of a configuration with its type, default and meaning, from the classes that hold them."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

_SECTION = re.compile(r"^(?:Args|Attributes):\n", re.MULTILINE)
_NEXT_SECTION = re.compile(r"^\S", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Key:
    """A key as users write it.

    Attributes:
        name: of the key, without its table.
        type: in words.
        default: as TOML; `needed` where there is none.
        meaning: a sentence or more.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of the configuration.

    Attributes:
        name: with the tables it is in, as `model.mamba2`; empty of keys that are in none.
        summary: what it is about.
        keys: in the order of the class.
    """

    name: str
    summary: str
    keys: tuple[Key, ...]


def read_tables(cls: type, name: str = "") -> Iterator[Table]:
    """The table of a configuration class, and those in it.

    Args:
        cls: a dataclass; its docstring, or that of a class it inherits from, has its fields under `Args` or
            `Attributes`.
        name: of its table.
    """
    hints, keys, inner = typing.get_type_hints(cls), [], []
    meanings = _meanings(cls)
    for field in dataclasses.fields(cls):
        hint, entry_of = hints[field.name], _entry(hints[field.name])
        if entry_of is not None:
            inner.append((entry_of, f"{name}.{field.name}" if name else field.name))
        if entry_of is not hint:
            keys.append(Key(field.name, _type(hint), _default(field), meanings.get(field.name, "")))
    yield Table(name, _SECTION.split(inspect.getdoc(cls) or "")[0].strip(), tuple(keys))
    for entry_of, where in inner:
        yield from read_tables(entry_of, where)


def choose_tables(tables: Sequence[Table], names: Sequence[str]) -> list[Table]:
    """The tables of these names, and those in them; all where none is named.

    Raises:
        UserError: there is none of a name.
    """
    for name in names:
        if name not in (table.name for table in tables):
            known = ", ".join(table.name for table in tables if table.name)
            raise UserError(f"there is no table {name}; there are {known}")
    return [t for t in tables if not names or any(f"{t.name}.".startswith(f"{name}.") for name in names)]


def format_text(tables: Sequence[Table], width: int = 100) -> str:
    """For a terminal."""
    lines: list[str] = []
    for table in filter(lambda table: table.keys, tables):
        summary = " ".join(table.summary.split())
        lines += [*([f"[{table.name}]"] if table.name else []), *textwrap.wrap(summary, width), ""]
        for key in table.keys:
            lines.append(f"  {key.name} = {key.default}    ({key.type})")
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def format_markdown(tables: Sequence[Table]) -> str:
    """For a page."""
    parts = []
    for table in filter(lambda table: table.keys, tables):
        head = f"### `[{table.name}]`\n\n" if table.name else ""
        rows = [
            f"| `{key.name}` | {key.type} | {key.default if key.default == 'needed' else f'`{key.default}`'} | "
            f"{key.meaning} |".replace("\n", " ")
            for key in table.keys
        ]
        summary = " ".join(table.summary.split())
        above = [f"{head}{summary}\n", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*above, *rows]))
    return "\n\n".join(parts) + "\n"


def _entry(hint: Any) -> type | None:
    """The class of a table, or of the entries of a list of tables."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def _meanings(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        sections = _SECTION.split(inspect.cleandoc(base.__doc__ or ""), maxsplit=1)
        if len(sections) < 2:
            continue
        body = _NEXT_SECTION.split(sections[1], maxsplit=1)[0]
        _, *entries = _ENTRY.split(body)
        for names, text in zip(entries[::2], entries[1::2], strict=True):
            text = re.sub(r"\bNone\b", "unset", " ".join(text.split()))
            found |= dict.fromkeys(names.split(", "), text)
    return found


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is typing.Literal:
        return " or ".join(f"`{_toml(value)}`" for value in arguments)
    if origin is tuple:
        if _entry(hint) is not None:
            return "list of tables"
        return f"list of {_type(arguments[0])}" if arguments[1:] == (...,) else f"{len(arguments)} numbers"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _toml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _toml(field.default_factory())
    return "needed"


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
