"""What one process meets reaches all of them."""

from collections.abc import Callable

import pytest
import torch.distributed as dist

from headrace.errors import UserError
from headrace.parallel.comm import do_together


def fail_on(rank: int, error: Exception) -> str:
    def action() -> str:
        if dist.get_rank() == rank:
            raise error
        return "done"

    try:
        return do_together(action)
    except UserError as met:
        return f"{met} {met.everywhere}"


@pytest.mark.parametrize("error", [UserError("no good"), FileNotFoundError(2, "no good")], ids=["user", "system"])
def test_an_error_of_one_is_raised_on_all(gloo: Callable, error: Exception) -> None:
    for rank in range(2):
        assert gloo(2, fail_on, rank, error) == [f"{error} True"] * 2
    assert gloo(2, fail_on, 5, error) == ["done"] * 2
