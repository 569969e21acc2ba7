"""Start several processes of the same command on this machine, through torchrun's own machinery."""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import UserError


def check_nproc(nproc: int) -> None:
    """Raises UserError for a number of processes that cannot be started."""
    if nproc < 1:
        raise UserError(f"--nproc={nproc} must be at least 1")


def run_processes(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m headrace ARGUMENTS` in `nproc` processes that see each other; the exit status of the first to fail.

    A process that fails ends the others. Each has said itself what was wrong, so nothing is printed here.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
