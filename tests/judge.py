"""Judges a kernel by its definition: results and all gradients, in memory that begins as NaN."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Results = list[Tensor]
Operator = Callable[..., Tensor | tuple[Tensor, ...]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Lets `torch.empty` return NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results_of(operator: Operator, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Results:
    """Outputs of `operator(*tensors)` in `dtype`, then the gradients of all tensors, for fixed output gradients."""
    leaves = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]
    outputs = operator(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(5)
    douts = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(outputs, given, douts, allow_unused=True, materialize_grads=True)
    return [*(out.detach() for out in outputs), *grads]


def assert_as_exact(kernel: Operator, reference: Operator, tensors: Sequence[Tensor | None]) -> None:
    """`kernel` in float32 errs from the float64 `reference` at most twice as much as the reference in float32."""
    exact = results_of(reference, tensors, torch.float64)
    usual = results_of(reference, tensors, torch.float32)
    with poisoned_memory():
        actual = results_of(kernel, tensors, torch.float32)
    for index, (e, u, a) in enumerate(zip(exact, usual, actual, strict=True)):
        assert a.dtype == u.dtype
        assert a.shape == u.shape
        one_rounding = torch.finfo(torch.float32).eps * e.norm()
        allowed = 2 * (u - e).norm() + one_rounding
        assert (a - e).norm() <= allowed, f"result {index}: error {(a - e).norm():.3e}, allowed {allowed:.3e}"
