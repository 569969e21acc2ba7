"""Checkpoints that are whole or not there: safetensors pieces under a hashed JSON manifest, loaded into any layout."""

from ..checkpoint_files.folders import (
    check_whole,
    checkpoint_step,
    is_whole,
    latest_checkpoint,
    list_checkpoints,
    previous_whole,
    set_aside,
)
from ..checkpoint_files.folders import remove as remove_checkpoint
from ..checkpoint_files.manifest import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointUnreadableError,
    CheckpointWriteError,
)
from .host_copy import HostCopy
from .load import load_checkpoint, load_full, read_extra, read_rank_tensors
from .save import save_checkpoint

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointUnreadableError",
    "CheckpointWriteError",
    "HostCopy",
    "check_whole",
    "checkpoint_step",
    "is_whole",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_full",
    "previous_whole",
    "read_extra",
    "read_rank_tensors",
    "remove_checkpoint",
    "save_checkpoint",
    "set_aside",
]
