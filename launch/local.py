"""Start several processes of the same command on this machine, through torchrun's own machinery."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import UserError

LAUNCHER = "HEADRACE_LAUNCHER"
PR_SET_PDEATHSIG = 1
# Activations come and go every step: glibc should keep their pages instead of returning them and faulting them in anew
# (about a tenth of a step on a CPU).
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def check_nproc(nproc: int) -> None:
    """Raises UserError for a number of processes that cannot be started."""
    if nproc < 1:
        raise UserError(f"--nproc={nproc} must be at least 1")


def end_with_launcher() -> None:
    """In a process that `run_processes` started: die when the launcher does, even of kill -9, instead of training on.

    Linux only; elsewhere, and in processes started otherwise, nothing happens.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def run_processes(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m headrace ARGUMENTS` in `nproc` processes that see each other.

    Returns 0, or the exit status of the first process to fail. A process that fails ends the others. Each has said
    itself what was wrong, so nothing is printed here.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)
    launch = LaunchConfig(
        run_id="headrace",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "headrace", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
