"""Processes of one run, started one by one as a cluster's scheduler does."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Ranks:
    """Processes by rank; what each prints goes to a file in `folder`."""

    processes: list[subprocess.Popen[bytes]]
    folder: Path

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.folder / f"said{rank}").read_text()

    def statuses(self, ranks: list[int], within_s: float) -> list[int]:
        """The exit statuses of `ranks`, none of which may take longer than `within_s` from now."""
        deadline = time.monotonic() + within_s
        return [self.processes[rank].wait(max(0.1, deadline - time.monotonic())) for rank in ranks]


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def start_ranks(folder: Path, command: list[str], size: int = 2, **environment: str) -> Iterator[Ranks]:
    """`size` processes that only the environment tells of each other; none outlives the block."""
    told = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **told, "MASTER_PORT": str(free_port()), **environment}
    ranks = Ranks([], folder)
    try:
        for rank in range(size):
            with (folder / f"said{rank}").open("wb") as said:
                ranks.processes.append(
                    subprocess.Popen(
                        command, stdout=said, stderr=subprocess.STDOUT, env={**environment, "RANK": str(rank)}
                    )
                )
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.wait()
