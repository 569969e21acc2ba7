"""The run folder: one process at a time, a record of what ran, and metrics that never show a step twice."""

import fcntl
import json
import os
import platform
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from .. import __version__
from ..errors import UserError, file_error
from .checkpoint_files.folders import checkpoint_step, latest_checkpoint
from .config import Config, load_config
from .config_io import to_tables
from .source import RECORD, check_source, source_record

LOCK_WAIT_S = 2.0
# A resumed run must compute what the first start would have, so these tables must not change ...
FIXED = ("run", "model", "data", "optimizer", "schedule", "train")
# ... but for where things lie (the data's fingerprint is compared), how a step is computed, and how the run ends.
FREE_TO_CHANGE = {
    "run.name",
    "run.root",
    "data.folder",
    "data.prefetch",
    "schedule.decay_fraction",
    "schedule.final_ratio",
    "train.steps",
    "train.micro_batch_rows",
    "train.recompute",
    "train.compile",
    "train.nonfinite_limit",
    "train.checksum_every",
}


@dataclass
class RunFolder:
    """`runs/<name>/` and the lock that keeps a second process out of it. Used on rank 0 only."""

    path: Path
    lock: IO[str]

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def stopped(self) -> Path:
        """What a run leaves that was asked to stop: its last step and who asked, as JSON; gone when it goes on."""
        return self.path / "STOPPED"

    def close(self) -> None:
        """Let the next process in."""
        self.lock.close()


def open_run_folder(config: Config) -> RunFolder:
    """The run folder of `config`, made if need be and locked; the lock falls with the process.

    Raises:
        UserError: another process uses the folder, the folder cannot be made, or it holds a run whose
            configuration differs in what determines the result.
    """
    path = config.run.folder
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.stat().st_mode & stat.S_IWOTH:
            raise UserError(f"run folder {path} may be written to by everyone; chmod o-w {path}")
        lock = (path / ".lock").open("a+")
        lock_exclusively(lock)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"run folder {path} is in use by {owner}; wait for it, or choose another run.name") from None
    except OSError as error:
        raise file_error(f"run folder {path} cannot be used: {error.strerror}", error) from None
    try:
        check_unchanged(path, config)
    except UserError:
        lock.close()
        raise
    return RunFolder(path, lock)


def lock_exclusively(lock: IO[str]) -> None:
    """Lock an open file, which whoever looks at a run's status holds for a moment, and a run that has ended, too.

    Raises:
        BlockingIOError: a process has held it for `LOCK_WAIT_S`.
    """
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def check_unchanged(path: Path, config: Config) -> None:
    """Raises UserError where the run folder `path` has checkpoints of another run, or of other code."""
    saved, latest = path / "config.toml", latest_checkpoint(path / "checkpoints")
    if saved.exists() and latest is not None:
        differences = load_config(saved).differences(config, FIXED)
        if changed := [line for line in differences if line.partition(":")[0] not in FREE_TO_CHANGE]:
            of_optimizer = all(line.startswith("optimizer.") for line in changed)
            if not (of_optimizer and config.checkpoint.fresh_optimizer):
                go_on = "; to go on with its weights, set checkpoint.fresh_optimizer=true" if of_optimizer else ""
                raise UserError(
                    f"run folder {path} holds a run with another configuration ({'; '.join(changed)}); "
                    f"choose another run.name, or delete the folder to start over{go_on}"
                )
        if checkpoint_step(latest) < config.train.steps and not config.checkpoint.other_code:
            check_source(path, _saved_commit(path))


def fixed_part(config: Config) -> dict[str, Any]:
    """By `table.key` every value of `config` that a run which goes on must not change."""
    found: dict[str, Any] = {}

    def visit(table: dict[str, Any], where: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                visit(value, f"{where}.{key}")
            elif f"{where}.{key}" not in FREE_TO_CHANGE:
                found[f"{where}.{key}"] = value

    for name in FIXED:
        visit(to_tables(getattr(config, name)), name)
    return found


def write_record(folder: RunFolder, config: Config, facts: dict[str, Any]) -> None:
    """Write `config.toml`, `source.json` and `manifest.json`: versions, commit, seed, and the given `facts`."""
    replace_file(folder.path / "config.toml", config.to_toml())
    replace_file(folder.path / RECORD, source_record())
    record = {
        "headrace": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in ("torch", "numpy", "safetensors", "sentencepiece")},
        "seed": config.run.seed,
        **facts,
    }
    replace_file(folder.path / "manifest.json", json.dumps(record, indent=2) + "\n")


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and a half-written last one: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(path, "".join(kept))


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        UserError: the folder may not be written to; `MachineError`, where the disk is full or fails.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or the name may be on the disk before the text
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise file_error(f"{path} cannot be written: {error.strerror}", error) from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _saved_commit(path: Path) -> str | None:
    """The commit of a run's last start, where its tree had no changes."""
    try:
        commit = json.loads((path / "manifest.json").read_text())["commit"]
    except (OSError, ValueError, KeyError):
        return None
    return commit if commit and "+" not in commit else None


def _commit() -> str | None:
    """The commit of the source tree, with `+changes` where it was changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed.strip() else "")
