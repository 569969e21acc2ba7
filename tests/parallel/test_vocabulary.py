"""The loss of a head whose vocabulary ranks share: the kernels, interpreted, against PyTorch."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from headrace.kernels.launch import record_launches
from headrace.parallel.vocabulary import vocabulary_loss

pytestmark = pytest.mark.interpreted


def vocabulary_results(backend: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 7, generator=generator), torch.randn(66, 7, generator=generator)
    target = torch.randint(66, (20,), generator=generator).masked_fill_(torch.arange(20) % 4 == 1, -100)
    mine = weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
    x.requires_grad_()
    with record_launches() as launches:
        loss, _ = vocabulary_loss(x, mine, target, dist.group.WORLD, backend=backend)
        dx, dweight = torch.autograd.grad(loss * 2, (x, mine))
    assert len(launches) == (4 if backend == "triton" else 0)
    return loss.detach(), dx, dweight


def test_ranks_that_share_a_vocabulary(gloo: Callable) -> None:
    plain, fused = (gloo(2, vocabulary_results, backend) for backend in ("torch", "triton"))
    for of_plain, of_fused in zip(plain, fused, strict=True):
        torch.testing.assert_close(of_fused, of_plain)
