"""Read frozen dataclasses from TOML with `key=value` overrides, and write them back.

Nothing here knows any particular field: types, names and defaults come from the dataclasses, ranges from
their `problems()` methods. All mistakes are collected before anything is raised.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: the file is missing, unreadable or not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config file {path} is not valid TOML: {error}") from None


def apply_overrides(tables: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tables` with each `a.b.c=value` set; values are TOML, and a bare word is a string.

    Raises:
        UserError: an override without `=`, or one that goes through a value that is no table.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} has no value; write it as section.key=value")
        *sections, leaf = key.strip().split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UserError(f"override {override!r}: {section} is a value, not a section")
        table[leaf] = _parse_value(text.strip())
    return tables


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls: type[T], table: Mapping[str, Any], errors: list[str], where: str = "") -> T | None:
    """An instance of dataclass `cls` from a TOML table; mistakes are appended to `errors`.

    Unknown keys name the nearest known one. Returns None when the table has mistakes of its own.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    before = len(errors)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            errors.append(f"unknown key {where}{key}{_nearest(key, fields)}")
            continue
        values[key] = _convert(hints[key], value, errors, f"{where}{key}")
    for name, field in fields.items():
        if name in values:
            continue
        if dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], {}, errors, f"{where}{name}.")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"missing key {where}{name}")
    return cls(**values) if len(errors) == before else None


def _nearest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, errors: list[str], where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, errors, f"{where}.")  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, errors, where)
    if origin is typing.Literal:
        if value not in arguments:
            errors.append(f"{where}={value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) != len(value):
            errors.append(f"{where} has {len(value)} items; it needs {len(inner)}")
            return value
        return tuple(_convert(h, v, errors, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    return _convert_scalar(origin or hint, value, errors, where)


def _convert_scalar(kind: Any, value: Any, errors: list[str], where: str) -> Any:
    if kind is float and isinstance(value, float) and math.isnan(value):
        errors.append(f"{where}=nan is not a number")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = "a table" if dataclasses.is_dataclass(kind) else f"of type {kind.__name__}"
        errors.append(f"{where}={value!r} is not {wanted}")
    return value


def to_tables(config: Any) -> dict[str, Any]:
    """The TOML tables of a config dataclass; `None` values are left out."""
    tables: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = [to_tables(entry) for entry in value]
        if value is not None:
            tables[field.name] = to_tables(value) if dataclasses.is_dataclass(value) else value
    return tables


def format_toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    """TOML text that `tomllib` reads back to the same values."""
    lines = [f"{key} = {_format_value(value)}" for key, value in tables.items() if not isinstance(value, Mapping)]
    for key, value in tables.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{key}"
            lines += ["", f"[{name}]", format_toml(value, f"{name}.")]
    return "\n".join(lines).strip("\n") + ("\n" if not prefix else "")


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_format_value(entry)}' for key, entry in value.items())} }}"
    escaped = "".join(f"\\u{ord(c):04X}" if ord(c) < 32 or c in '"\\\x7f' else c for c in str(value))
    return f'"{escaped}"'
