"""Runs that learning is judged by: the quickstart's configuration with other options, and their held-out losses."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace.pretrain.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.toml"
Curve = list[tuple[int, float]]


def held_out(options: list[str], nproc: int = 2) -> Curve:
    """Held-out loss by step, of a run that is started if need be, or goes on from where it was.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "headrace", "train", str(CONFIG), *options, "--nproc", str(nproc)]
    threads = {"OMP_NUM_THREADS": "1"} if nproc == 1 else {}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | threads)
    folder = ROOT / load_config(CONFIG, options).run.folder
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "eval"]


def side_by_side(runs: dict[Any, list[str]]) -> dict[Any, Curve]:
    """The same of many runs of one process and thread each, one a core at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        curves = workers.map(lambda options: held_out(options, nproc=1), runs.values())
        return dict(zip(runs, curves, strict=True))
