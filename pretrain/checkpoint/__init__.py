"""Checkpoints that are whole or not there: safetensors pieces under a hashed JSON manifest, loaded into any layout."""

from .folders import latest_checkpoint, list_checkpoints
from .load import load_checkpoint, load_full, read_extra, read_rank_tensors
from .manifest import CheckpointDamagedError, CheckpointError
from .save import save_checkpoint

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_full",
    "read_extra",
    "read_rank_tensors",
    "save_checkpoint",
]
