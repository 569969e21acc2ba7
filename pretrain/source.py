"""The code of a run: the same on all processes, and from one start to the next unless that is wanted."""

import hashlib
import json
import platform
from pathlib import Path

import torch

from ..errors import UserError

RECORD = "source.json"
SHOWN = 5


def source_files() -> list[Path]:
    """The package's Python files, tests and benchmarks aside."""
    root = Path(__file__).resolve().parents[1]
    folders = [folder.parent for folder in root.glob("*/__init__.py")]
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def source_hashes() -> dict[str, str]:
    """A hash of each of these files, by its path in the package."""
    root = Path(__file__).resolve().parents[1]
    return {
        path.relative_to(root).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for path in source_files()
    }


def source_hash() -> str:
    """One hash over all of them, by name and content."""
    return hashlib.blake2b(json.dumps(source_hashes()).encode(), digest_size=6).hexdigest()


def source_record() -> str:
    """What computes this start, as JSON: every file's hash, the versions of PyTorch and Python."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    return json.dumps({"versions": versions, "files": source_hashes()}, indent=1) + "\n"


def check_source(folder: Path, commit: str | None) -> None:
    """Compare this code with that of the last start in a run folder, if one is on record there.

    Args:
        folder: the run folder.
        commit: of the last start, to be named as a way back.

    Raises:
        UserError: they differ; says in what.
    """
    try:
        saved = json.loads((folder / RECORD).read_text())
        versions, files = dict(saved["versions"]), dict(saved["files"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / RECORD} is damaged; remove it to go on with the code that is here") from None
    now = json.loads(source_record())
    other = [
        f"{key}: {versions.get(key)} -> {value}" for key, value in now["versions"].items() if versions.get(key) != value
    ]
    changed = _changed_files(files, now["files"])
    if not other and not changed:
        return
    more = [f"and {len(changed) - SHOWN} more files"] if len(changed) > SHOWN else []
    back = f", or go back to commit {commit}" if commit else ""
    raise UserError(
        f"run folder {folder} was last trained by other code ({'; '.join([*other, *changed[:SHOWN], *more])}); "
        f"to go on with this code set checkpoint.other_code=true{back}"
    )


def _changed_files(before: dict[str, str], after: dict[str, str]) -> list[str]:
    words = {(True, True): "changed", (True, False): "gone", (False, True): "new"}
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name} {words[name in before, name in after]}" for name in names]
