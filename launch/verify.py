"""`headrace verify`: the checkpoints of a run held against their hashes, without loading torch."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..pretrain.checkpoint_files import list_checkpoints, verify_checkpoint
from ..pretrain.checkpoint_files.verify import Verified


def verify(source: Path, say: Callable[[str], None]) -> bool:
    """Check the checkpoint `source`, or all of the run folder `source`, oldest first; whether all are whole.

    Args:
        say: takes a line for each checkpoint as soon as it is checked, and below it one for each further damage.

    Raises:
        UserError: there is nothing to check.
    """
    if (source / "config.toml").is_file():
        found = list_checkpoints(source / "checkpoints")
        if not found:
            raise UserError(f"{source} holds no checkpoint; let the run reach its first save")
    elif source.is_dir():
        found = [source]
    elif source.exists():
        raise UserError(f"{source} is a file and no folder; give a run folder (runs/NAME) or one of its checkpoints")
    else:
        raise UserError(f"{source} does not exist; give a run folder (runs/NAME) or one of its checkpoints")
    whole = True
    for path in found:
        checked = _check(path)
        if checked is None:
            say(f"{path}: removed by its run meanwhile")
            continue
        if not checked.damage:
            say(f"{path}: good, {checked.tensors} tensors, {checked.bytes / 1e6:,.1f} MB")
            continue
        whole = False
        first, *further = checked.damage
        say(f"{path}: DAMAGED, {_without(first, path)}")
        for line in further:
            say(f"  and {_without(line, path)}")
    return whole


def _check(path: Path) -> Verified | None:
    """What `verify_checkpoint` finds; None where the folder is gone by then: a run keeps only its newest."""
    try:
        checked = verify_checkpoint(path)
    except UserError:
        if path.is_dir():
            raise
        return None
    return checked if not checked.damage or path.is_dir() else None


def _without(line: str, path: Path) -> str:
    return line.removeprefix(f"checkpoint {path}: ")
