"""Checkpoints that are whole or not there: safetensors pieces under a hashed JSON manifest, loaded into any layout."""

from .folders import checkpoint_step, latest_checkpoint, list_checkpoints
from .folders import remove as remove_checkpoint
from .load import load_checkpoint, load_full, read_extra, read_rank_tensors
from .manifest import CheckpointDamagedError, CheckpointError
from .save import save_checkpoint

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "checkpoint_step",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_full",
    "read_extra",
    "read_rank_tensors",
    "remove_checkpoint",
    "save_checkpoint",
]
