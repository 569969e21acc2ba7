"""Checks of this process's machine: versions, the date, the port, the device and its memory."""

import os
import platform
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..pretrain.checkpoint.host_copy import available_memory
from ..pretrain.source import source_files, source_hash
from .findings import Finding

DAY_S = 86400.0
LEAST_TORCH = "2.11"
# Activations and the libraries' own buffers come on top of what a rank holds.
ROOM = 0.8


def check_versions() -> Finding:
    """Python, torch, triton and the source: the same on all ranks."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    text = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton}, source {source_hash()}"
    if torch.__version__ < LEAST_TORCH:
        return Finding("versions", "FAIL", f"{text}; torch {LEAST_TORCH} or newer is needed", everywhere=True)
    return Finding("versions", "ok", text, everywhere=True)


def check_code_date(now_s: float | None = None) -> Finding:
    """Whether the clock is behind the newest source file or commit: then it is the clock that is wrong.

    Args:
        now_s: seconds since 1970; None: the clock's.
    """
    now_s = time.time() if now_s is None else now_s
    newest_s = max([path.stat().st_mtime for path in source_files()] + _commit_times())
    stamp, behind_s = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)), newest_s - now_s
    if behind_s <= 1.0:
        return Finding("date", "ok", f"{stamp[:10]}, after the newest source")
    text = f"the clock says {stamp}, {behind_s:,.0f} s before the newest source was written; set it (chrony, ntpd)"
    return Finding("date", "FAIL" if behind_s > DAY_S else "warn", text)


def _commit_times() -> list[float]:
    """When the newest commit was made, seconds since 1970; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
    if not (root / ".git").exists():
        return []
    try:
        return [float(subprocess.run(git, capture_output=True, text=True, check=True).stdout)]
    except (OSError, subprocess.CalledProcessError, ValueError):
        return []


def check_port() -> Finding:
    """Whether the port where processes meet is free here, on the first process."""
    text = os.environ["MASTER_PORT"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return Finding("port", "ok", f"MASTER_PORT={text} is kept by the launcher")
    if not text.isdigit() or not 0 < int(text) < 65536:
        return Finding("port", "FAIL", f"MASTER_PORT={text} is no port; use a number between 1024 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
            probe.listen()
        except OSError as error:
            words = f"MASTER_PORT={text} cannot be used here ({error.strerror}); set another"
            return Finding("port", "FAIL", words)
    return Finding("port", "ok", f"MASTER_PORT={text} is free")


def check_device(device: torch.device) -> Finding:
    """What this process computes on."""
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0))
        return Finding("device", "warn", f"no CUDA device is visible: the run computes on the CPU ({cores} cores)")
    found = torch.cuda.get_device_properties(device)
    text = f"{found.name}, compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"
    return Finding("device", "ok", text)


def check_memory(device: torch.device, held_bytes: int, neighbours: int) -> Finding:
    """Whether what this rank holds fits, activations aside.

    Args:
        device: of this process.
        held_bytes: parameters, gradients and optimizer state of this rank.
        neighbours: processes on this machine, which share its memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        words = f"of {total / 1e9:.1f} GB on the device {free / 1e9:.1f} are free"
    else:
        known = available_memory()
        if known is None:
            return Finding(
                "memory", "warn", f"a rank holds {held_bytes / 1e9:.3f} GB; how much is free is not known here"
            )
        free = known // neighbours
        words = f"{free / 1e9:.1f} GB of memory are free for each of {neighbours} processes here"
    text = f"a rank holds {held_bytes / 1e9:.3f} GB before activations; {words}"
    if held_bytes > free:
        return Finding("memory", "FAIL", f"{text}; use more ranks (parallel.dp_shard, tp, pp) or another optimizer")
    return Finding("memory", "warn" if held_bytes > ROOM * free else "ok", text)
