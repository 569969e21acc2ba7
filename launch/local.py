"""Start several processes of the same command on this machine, through torchrun's own machinery."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import UserError
from ..parallel.watch import WATCH_STORE, last_step

LAUNCHER = "HEADRACE_LAUNCHER"
PR_SET_PDEATHSIG = 1


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


def pass_on(number: int, _frame: FrameType | None) -> None:
    """Give a signal to the processes that this one started; Linux only."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children")
    for pid in children.read_text().split() if children.exists() else []:
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)


def run_processes(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m headrace ARGUMENTS` in `nproc` processes that see each other.

    Returns 0, or the exit status of the process that failed. A process that fails ends the others. It has said itself
    what was wrong, unless a signal ended it.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = signal.signal(signal.SIGUSR1, pass_on)  # torchrun's machinery passes SIGTERM on, and waits for its effect
    beats = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {LAUNCHER: str(os.getpid()), WATCH_STORE: f"127.0.0.1:{beats.port}"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
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
    except SignalException as ended:
        if ended.sigval is signal.SIGINT:
            raise KeyboardInterrupt from None
        print(f"headrace: ended by {ended.sigval.name}", file=sys.stderr)
        return 128 + ended.sigval
    except ChildFailedError as error:
        status = max(failure.exitcode for failure in error.failures.values())
        if status < 0:
            rank, failure = error.get_first_failure()
            hint = "; the system does that when memory runs out" if -status == signal.SIGKILL else ""
            step = last_step(beats, nproc)
            last = "no step was finished yet" if step is None else f"last finished step {step}"
            print(f"headrace: error: rank {rank} was ended by {failure.signal_name()}{hint}; {last}", file=sys.stderr)
        return status if status > 0 else 1
    finally:
        signal.signal(signal.SIGUSR1, before)
        del os.environ[LAUNCHER], os.environ[WATCH_STORE]
    return 0
