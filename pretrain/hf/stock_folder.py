"""Reads and writes the files of a Hugging Face model folder: config.json, and safetensors in one or many files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ...errors import UserError

SHARD_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT32_BYTES = 4


def plan_shards(shapes: Mapping[str, Sequence[int]], limit: int) -> dict[str, list[str]]:
    """Files of at most `limit` bytes (or one tensor) and the float32 tensors that each holds, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = FLOAT32_BYTES * prod(shape)
        if groups[-1] and size + bytes_ > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def write_weights(
    folder: Path, shapes: Mapping[str, Sequence[int]], tensors: Callable[[list[str]], dict[str, Tensor]], limit: int
) -> int:
    """Writes float32 tensors, one file's worth in memory at a time, and an index where there are several files.

    `tensors(names)` gives the tensors of one file. Returns the bytes of all tensors.
    """
    shards = plan_shards(shapes, limit)
    total = sum(FLOAT32_BYTES * prod(shape) for shape in shapes.values())
    for file, names in shards.items():
        save_file(tensors(names), folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, safetensors only.

    Raises:
        UserError: there are none (a pickle is never opened), or a file is missing or damaged.
    """
    index = folder / INDEX
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        raise UserError(f"{folder} holds no {WEIGHTS}; convert its weights to safetensors (pickles are not opened)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / Path(file).name
        try:
            with safetensors.safe_open(path, framework="pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, safetensors.SafetensorError, struct.error) as error:
            raise UserError(f"{path} is missing or damaged ({error}); fetch the folder again") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, readable by any JSON reader: no infinities."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
