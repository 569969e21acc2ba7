"""Numbers that torchrun, slurm or the user set in the environment. Loads no torch."""

import os
from collections.abc import Mapping

from ..errors import UserError


def read_number(
    name: str, default: int | None = None, *, least: int = 0, environment: Mapping[str, str] = os.environ
) -> int:
    """The whole number in an environment variable; `default` where it is not set.

    Raises:
        UserError: it is no number, or below `least`; it is not set, and there is no default.
    """
    text = environment.get(name)
    if text is None:
        if default is None:
            raise UserError(f"{name} is not set; start with torchrun, srun or --nproc")
        return default
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits) >= least):
        raise UserError(
            f"{name}={text!r} in the environment must be a whole number of at least {least}; set or unset it"
        )
    return int(digits)


def read_group() -> tuple[int, int]:
    """This process's rank and the number of processes, as RANK and WORLD_SIZE say; 0 of 1 where neither is set.

    Raises:
        UserError: one is no number, or they do not fit together.
    """
    rank, size = read_number("RANK", 0), read_number("WORLD_SIZE", 1, least=1)
    if "RANK" not in os.environ and size > 1:
        raise UserError(f"WORLD_SIZE={size} is set but RANK is not; start with torchrun, srun or --nproc, or unset it")
    if rank >= size:
        said = f"={size}" if "WORLD_SIZE" in os.environ else ", which is not set"
        raise UserError(
            f"RANK={rank} must be below WORLD_SIZE{said}; start with torchrun, srun or --nproc, or unset RANK"
        )
    return rank, size
