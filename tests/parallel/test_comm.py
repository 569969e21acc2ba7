"""What one process meets reaches all of them."""

import errno
from collections.abc import Callable

import pytest
import torch.distributed as dist

from headrace.errors import MachineError, UserError
from headrace.parallel.comm import do_together


def fail_on(rank: int, error: Exception) -> str:
    def action() -> str:
        if dist.get_rank() == rank:
            raise error
        return "done"

    try:
        return do_together(action)
    except UserError as met:
        return f"{met} {met.everywhere} {met.status}"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no good"), 2),
        (MachineError("no good"), 1),
        (FileNotFoundError(errno.ENOENT, "no good"), 2),
        (OSError(errno.EIO, "no good"), 1),
    ],
)
def test_an_error_of_one_is_raised_on_all(gloo: Callable, error: Exception, status: int) -> None:
    for rank in range(2):
        assert gloo(2, fail_on, rank, error) == [f"{error} True {status}"] * 2
    assert gloo(2, fail_on, 5, error) == ["done"] * 2
