"""What checkpoints are on disk: folders, manifest, files and their checks; nothing here loads torch."""

from .folders import check_whole, is_whole, latest_checkpoint, list_checkpoints, previous_whole, set_aside
from .manifest import CheckpointDamagedError, CheckpointError, CheckpointUnreadableError, CheckpointWriteError
from .verify import verify_checkpoint

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointUnreadableError",
    "CheckpointWriteError",
    "check_whole",
    "is_whole",
    "latest_checkpoint",
    "list_checkpoints",
    "previous_whole",
    "set_aside",
    "verify_checkpoint",
]
