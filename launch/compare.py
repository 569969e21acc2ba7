"""In what two runs differ: configuration, code, packages and data, read without loading torch."""

import json
import tomllib
from collections.abc import Mapping
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
    try:
        config = tomllib.loads((folder / "config.toml").read_text())
        record = json.loads((folder / "manifest.json").read_text())
        source = folder / "source.json"  # of older runs there is none
        code = json.loads(source.read_text())["files"] if source.exists() else {}
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no run folder: it has no {Path(error.filename).name}; give runs/NAME") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{folder} cannot be read ({error}); restore config.toml, manifest.json and source.json"
        ) from None
    return {**_flat(config, "config"), **_flat(record, "record"), **_flat(code, "code")}


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}"
        found |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def _shown(facts: Mapping[str, Any], key: str) -> str:
    return json.dumps(facts[key]) if key in facts else "nothing"
