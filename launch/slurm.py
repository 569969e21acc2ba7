"""What slurm tells the processes it starts, in the words of torchrun."""

import os
import re
from collections.abc import MutableMapping
from functools import partial

from ..errors import UserError
from ..parallel.environment import read_number

# Ports of jobs on one machine differ as their numbers do; the range is free on most systems.
FIRST_PORT, PORTS = 20000, 10000
# Jobs with numbers close together may share a machine, and each has a step for every start.
STEP_STRIDE = 1009


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make a process that `srun` started one of torchrun's, in place; others are left as they are.

    The first host of the job is where processes meet, at a port that follows from the job's and step's numbers; set
    MASTER_ADDR or MASTER_PORT to say otherwise.

    Raises:
        UserError: slurm's variables do not fit together, or one is no number.
    """
    # A batch script has SLURM_PROCID too, and no step.
    if "RANK" in environment or not {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return
    number = partial(read_number, environment=environment)
    rank, size = number("SLURM_PROCID"), number("SLURM_NTASKS", 1)
    if size <= 1:
        return
    needed = ("SLURM_LOCALID", "SLURM_JOB_ID")
    if missing := [name for name in needed if name not in environment]:
        raise UserError(
            f"started by srun, but {', '.join(missing)} is not set; start with srun in a job, or by torchrun"
        )
    if rank >= size:
        raise UserError(f"SLURM_PROCID={rank} must be below SLURM_NTASKS={size}; start with srun in a job")
    hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
    port = FIRST_PORT + (number("SLURM_JOB_ID") + STEP_STRIDE * number("SLURM_STEP_ID", 0)) % PORTS
    # Bound to its own GPU a process sees it as the first, whichever it is.
    bound = environment.get("SLURM_GPUS_PER_TASK") == "1" or "single:1" in environment.get("SLURM_GPU_BIND", "")
    local_rank = 0 if bound else number("SLURM_LOCALID")
    if "SLURM_STEP_TASKS_PER_NODE" in environment and "SLURM_NODEID" in environment:
        tasks, node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"]), number("SLURM_NODEID")
        if node >= len(tasks):
            raise UserError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE lists {len(tasks)}; start with srun")
        environment["LOCAL_WORLD_SIZE"] = str(tasks[node])
    environment.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": environment.get("MASTER_ADDR", hosts[0]),
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        }
    )


def expand_counts(text: str) -> list[int]:
    """Numbers of tasks by node, as slurm shortens them: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        UserError: it is no such list.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise UserError(f"{text!r} is no list of tasks as slurm writes them")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str) -> list[str]:
    """The names in a host list of slurm's, as `gpu[01-03,7],login2`, in order.

    Raises:
        UserError: it is none.
    """
    entries = re.findall(r"((?:[^,\[\]]|\[[^\[\]]*\])+)(?:,|$)", text)
    if ",".join(entries) != text or not text:
        raise UserError(f"{text!r} is no list of hosts as slurm writes them")
    return [host for entry in entries for host in _expand(entry)]


def _expand(entry: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", entry)
    if match is None:
        return [entry]
    head, body, rest = match.groups()
    found = []
    for part in body.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if numbers is None or int(numbers[1]) > int(numbers[2] or numbers[1]):
            raise UserError(f"{entry!r} is no list of hosts as slurm writes them")
        low, high = numbers[1], numbers[2] or numbers[1]
        found += [f"{head}{n:0{len(low)}d}{tail}" for n in range(int(low), int(high) + 1) for tail in _expand(rest)]
    return found
