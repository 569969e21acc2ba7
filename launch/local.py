"""Start several processes of the same command on this machine, through torchrun's own machinery."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
# Torchrun's machinery leaves its own handlers of these behind, which raise what nobody catches.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)

# A mistake of the user's: the next start would make it again.
USER_ERROR = UserError.status
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


@dataclass(frozen=True)
class Ending:
    """How a start of several processes ended.

    Attributes:
        status: 0, or the exit status of the process that failed.
        step: the last step that any of them is known to have finished; None where none is.
        asked: a signal ended it that asks for an end.
    """

    status: int
    step: int | None = None
    asked: bool = False


def check_nproc(nproc: int, restarts: int = 0) -> None:
    """Raises UserError for a number of processes, or of restarts, that cannot be."""
    if nproc < 1:
        raise UserError(f"--nproc={nproc} must be at least 1")
    if restarts < 0:
        raise UserError(f"--restarts={restarts} must not be negative")


def run_again_and_again(arguments: Sequence[str], nproc: int, restarts: int) -> int:
    """`run_processes`, and again after a crash or a hang, unless it ended so `restarts` times without a new step.

    After a start without a new step the next waits, 2 s and then twice as long each time, a minute at most; a signal
    that comes meanwhile does what it does to any process.

    A step is new when no start before has come so far: what is computed a second time is no way forward. Nothing is
    started again after a mistake of the user's, or where a signal asked for the end.

    Returns the status of the last start.
    """
    furthest, in_vain = -1, 0
    while True:
        ended = run_processes(arguments, nproc)
        step = -1 if ended.step is None else ended.step
        in_vain = 0 if step > furthest else in_vain + 1
        furthest = max(furthest, step)
        if ended.status in (0, USER_ERROR) or ended.asked or not restarts:
            return ended.status
        if in_vain >= restarts:
            print(f"headrace: error: {in_vain} starts without a new step: given up", file=sys.stderr, flush=True)
            return ended.status
        if in_vain:  # what is wrong may pass: a disk, a file system that is away
            time.sleep(min(FIRST_PAUSE_S * 2 ** (in_vain - 1), LONGEST_PAUSE_S))
        tries = f"; {in_vain} of {restarts} without a new step" if in_vain else ""
        print(f"headrace: started again from the newest checkpoint{tries}", file=sys.stderr, flush=True)


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


@contextmanager
def keep_handlers(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """What becomes of these signals is afterwards as before."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python has not set, and cannot set again
                signal.signal(number, handler)


def run_processes(arguments: Sequence[str], nproc: int) -> Ending:
    """Run `python -m headrace ARGUMENTS` in `nproc` processes that see each other.

    A process that fails ends the others. It has said itself what was wrong, unless a signal ended it.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    asked: list[int] = []

    def pass_on_and_note(number: int, frame: FrameType | None) -> None:
        asked.append(number)  # ranks that are not yet listening die of it
        pass_on(number, frame)

    # torchrun's machinery passes these on, and waits for their effect; under nohup it must not listen to SIGHUP.
    passed_on = [n.name for n in ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
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
        signals_to_handle=",".join(passed_on),
    )
    try:
        with keep_handlers([*ENDING, signal.SIGUSR1]):
            signal.signal(signal.SIGUSR1, pass_on_and_note)
            elastic_launch(launch, sys.executable)("-m", "headrace", *arguments)
    except SignalException as ended:
        if ended.sigval is signal.SIGINT:
            raise KeyboardInterrupt from None
        print(f"headrace: ended by {ended.sigval.name}", file=sys.stderr)
        return Ending(128 + ended.sigval, asked=True)
    except ChildFailedError as error:
        return replace(describe_failure(error, last_step(beats, nproc)), asked=bool(asked))
    finally:
        del os.environ[LAUNCHER], os.environ[WATCH_STORE]
    return Ending(0)


def describe_failure(error: ChildFailedError, step: int | None) -> Ending:
    """How a start ended in which processes failed; those that a signal ended cannot say so themselves.

    What others met because one was killed is no mistake of the user's, whatever their status. After a first failure
    the launcher itself ends the rest by SIGTERM.
    """
    failures = error.failures
    status = max(failure.exitcode for failure in failures.values())
    killed = {r: f for r, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if status > 0 and not (status == USER_ERROR and killed):
        return Ending(status, step)
    rank, failure = min((killed or failures).items(), key=lambda item: item[1].timestamp)
    hint = "; the system does that when memory runs out" if -failure.exitcode == signal.SIGKILL else ""
    last = "no step was finished yet" if step is None else f"last finished step {step}"
    print(f"headrace: error: rank {rank} was ended by {failure.signal_name()}{hint}; {last}", file=sys.stderr)
    return Ending(1, step)
