"""What all operators agree on: the dtype of sums, when gradients are needed, how large a block of work is."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Elements of one operand in a block of elementwise work: a few such operands stay within a core's cache.
BLOCK_ELEMENTS = 1 << 17


# Whether the operations under way are the inside of one operator, of which selective recomputation keeps nothing.
inside_operator: ContextVar[bool] = ContextVar("inside_operator", default=False)


@contextmanager
def one_operator() -> Iterator[None]:
    """Marks what follows as the inside of one operator; for those that are no custom operator because they send."""
    token = inside_operator.set(True)
    try:
        yield
    finally:
        inside_operator.reset(token)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and states for inputs like `x`: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def needs_gradient(*values: Tensor | None) -> bool:
    """Return whether autograd will ask for the gradient of any of `values`."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def working_copy(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of `dtype` to compute `out` in: `out` itself where it has that dtype, else an empty one."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def store(out: Tensor, computed: Tensor) -> None:
    """Write what was computed in `working_copy(out, dtype)` to `out`."""
    if computed.dtype != out.dtype:
        out.copy_(computed)


def blocks(length: int, row_elements: int, at_least: int = 16) -> Iterator[slice]:
    """Cut `length` rows of `row_elements` elements each into slices that stay within cache, `at_least` rows long."""
    step = max(at_least, BLOCK_ELEMENTS // max(row_elements, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
