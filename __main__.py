"""`python -m headrace` is the command `headrace`."""

import os
import sys

from .launch.cli import main


def run() -> None:
    """Run the command and leave with its exit status.

    A process that joined a process group leaves at once: gloo's threads may still want the interpreter to let go of
    tensors, and if it is being taken down under them they abort the process, its exit status with it.
    """
    status = main()
    if "headrace.parallel.mesh" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
