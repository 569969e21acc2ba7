"""In what two runs differ: configuration, code, packages and data, read without loading torch."""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

# What every start of a run writes anew without making it another run.
PASSING = ("config.run.name", "record.resumed_at", "record.run", "record.start")


def differences(first: Path, second: Path) -> list[str]:
    """Lines `key: first -> second`, of `config.toml`, `manifest.json` and, by their hashes, source files.

    None where the runs are of one kind.

    Raises:
        UserError: a folder is no run folder, or its files are damaged.
    """
    left, right = _facts(first), _facts(second)
    keys = [key for key in {**left, **right} if key not in PASSING and left.get(key) != right.get(key)]
    return [f"{key}: {_shown(left, key)} -> {_shown(right, key)}" for key in keys]


def _facts(folder: Path) -> dict[str, Any]:
    source = folder / "source.json"  # of older runs there is none
    facts = _read(folder / "config.toml", tomllib.loads, "config") | _read(
        folder / "manifest.json", json.loads, "record"
    )
    return facts | (_read(source, lambda text: json.loads(text)["files"], "code") if source.exists() else {})


def _read(path: Path, parse: Callable[[str], Any], prefix: str) -> dict[str, Any]:
    """What is in a file, by key."""
    try:
        table = parse(path.read_text())
        if isinstance(table, dict):
            return _flat(table, prefix)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}; give runs/NAME") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
    except (KeyError, TypeError):
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore it") from None
    raise UserError(f"{path} does not hold what a run writes there; restore it")


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}"
        found |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def _shown(facts: Mapping[str, Any], key: str) -> str:
    return json.dumps(facts[key], default=str) if key in facts else "nothing"
