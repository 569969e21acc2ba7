"""Exclusive scans over ranks, for every transition class, exchange and assignment of segments, with gradients."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from headrace.kernels.affine import DENSE, DIAGONAL, SCALAR, Transition
from headrace.parallel.config import Exchange, ParallelConfig
from headrace.parallel.context import SegmentedContext, share_row
from headrace.parallel.exchange import StateExchange, choose
from headrace.parallel.layout import SequenceLayout, contiguous, zigzag
from headrace.parallel.mesh import build_mesh
from headrace.parallel.recompute import Recompute, recompute_blocks
from headrace.parallel.state_passing import EnteringStates, RememberedExchange
from tiny import this_world

HOWS: tuple[Exchange, ...] = ("chain", "doubling", "gather", "auto")
# Shapes of M and of S.
CLASSES: dict[str, tuple[Transition, tuple[int, ...], tuple[int, ...]]] = {
    "scalar": (SCALAR, (2, 3), (2, 3, 4, 5)),
    "diagonal": (DIAGONAL, (2, 3, 1, 5), (2, 3, 4, 5)),
    "dense": (DENSE, (2, 3, 4, 4), (2, 3, 4, 5)),
}


def summaries(layout: SequenceLayout, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """`M` and `S` of all segments, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    _, m_shape, s_shape = CLASSES[name]

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(m_shape) for _ in layout.owners], [draw(s_shape) for _ in layout.owners]


def weights(layout: SequenceLayout, name: str) -> list[Tensor]:
    """What each entering state is multiplied with in the test's loss."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(CLASSES[name][2], generator=generator, dtype=torch.float64) for _ in layout.owners]


def in_order(layout: SequenceLayout, name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Entering states one after the other, and the gradients of M and S by autograd."""
    transition = CLASSES[name][0]
    M, S = summaries(layout, name)
    state, entering = torch.zeros_like(S[0]).requires_grad_(), []
    for m, s in zip(M, S, strict=True):
        entering.append(state)
        state = (m @ state if transition.dense else transition.apply(m, state)) + s
    sum((w * e).sum() for w, e in zip(weights(layout, name), entering, strict=True)).backward()  # type: ignore[union-attr]
    return [e.detach() for e in entering], *([_grad(value) for value in values] for values in (M, S))


def _grad(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def spread(layout: SequenceLayout, name: str, how: Exchange) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """This rank's entering states and gradients, by segment."""
    assert dist.group.WORLD is not None
    exchange = StateExchange(layout, dist.group.WORLD, how, CLASSES[name][0])
    M, S = summaries(layout, name)
    mine = layout.of_rank(dist.get_rank())
    entering = EnteringStates.apply(exchange, *(M[s] for s in mine), *(S[s] for s in mine))
    all_weights = weights(layout, name)
    sum((all_weights[s] * e).sum() for s, e in zip(mine, entering, strict=True)).backward()  # type: ignore[union-attr]
    return {s: (e.detach(), _grad(M[s]), _grad(S[s])) for s, e in zip(mine, entering, strict=True)}


LAYOUTS = {
    1: [contiguous(9, 1), contiguous(9, 1, 4), zigzag(9, 1, 2)],
    2: [contiguous(9, 2), zigzag(9, 2), SequenceLayout((1, 0, 0, 1, 0), (0, 1, 2, 3, 4, 5))],
    3: [contiguous(9, 3, 2), zigzag(9, 3)],
    4: [contiguous(9, 4), zigzag(9, 4), SequenceLayout((2, 0, 3, 3, 1, 0, 2), tuple(range(8)))],
}


def spread_all(layouts: list[SequenceLayout]) -> list[dict[int, tuple[Tensor, Tensor, Tensor]]]:
    return [spread(*case) for case in product(layouts, CLASSES, HOWS)]


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_states_and_gradients_equal_those_of_one_process(gloo: Callable, ranks: int) -> None:
    by_rank = gloo(ranks, spread_all, LAYOUTS[ranks])
    for case, found in zip(product(LAYOUTS[ranks], CLASSES, HOWS), zip(*by_rank, strict=True), strict=True):
        layout, name, how = case
        merged = {segment: values for part in found for segment, values in part.items()}
        assert len(merged) == len(layout.owners)
        for segment, expected in enumerate(zip(*in_order(layout, name), strict=True)):
            for a, b in zip(merged[segment], expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=f"{layout} {name} {how} {segment}")


@pytest.mark.parametrize("how", ["none", "full", "selective"])
@pytest.mark.parametrize("name", CLASSES)
def test_recomputation_gets_the_states_it_was_given(gloo: Callable, name: str, how: str) -> None:
    """A layer of plain products around the exchange: a recomputation that counts wrongly would mix them up."""
    assert gloo(2, recomputed_gradients, name, how) == gloo(2, recomputed_gradients, name, "none")


def recomputed_gradients(name: str, how: Recompute) -> list[list[float]]:
    config = ParallelConfig(cp=2)
    mesh = build_mesh(config, this_world())
    _, seq = share_row(config, mesh, [torch.zeros(1, 4)], None)
    assert isinstance(seq, SegmentedContext)
    transition, m_shape, s_shape = CLASSES[name]
    generator = torch.Generator().manual_seed(dist.get_rank())
    M, S = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (m_shape, s_shape))
    weight = torch.eye(s_shape[-1], dtype=torch.float64).requires_grad_()
    S.requires_grad_()

    class Layer(torch.nn.Module):
        def forward(self, S: Tensor, seq: SegmentedContext, update: Tensor | None) -> Tensor:
            S = S if update is None else S + update
            exchange = RememberedExchange(seq, "layer", transition)
            (entering,) = EnteringStates.apply(exchange, M.clone().requires_grad_(), (S @ weight).tanh() @ weight)
            return (entering @ weight).square() @ weight

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({"0": Layer()})
    recompute_blocks(model, how)  # type: ignore[arg-type]
    model.layers["0"](S, seq, S.detach()).sum().backward()
    assert weight.grad is not None
    assert S.grad is not None
    return [weight.grad.flatten().tolist(), S.grad.flatten().tolist()]


def test_auto_follows_size_and_topology() -> None:
    assert choose(1, 1, 1 << 20, on_one_machine=True) == "chain"
    assert choose(2, 2, 1 << 30, on_one_machine=False) == "chain"
    assert choose(8, 8, 1 << 10, on_one_machine=False) == "gather"
    assert choose(8, 8, 1 << 24, on_one_machine=True) == "doubling"
    # Between machines bytes cost more: what is gathered inside one is doubled across several.
    assert [choose(8, 8, 1 << 18, on_one_machine=here) for here in (True, False)] == ["gather", "doubling"]
    # A transition as large as the state, as that of Mamba-1 is, makes all but the chain dearer.
    assert [choose(4, 4, 1 << 23, size, on_one_machine=True) for size in (0, 1 << 23)] == ["doubling", "chain"]


def test_transitions_form_a_monoid() -> None:
    for transition, m_shape, s_shape in CLASSES.values():
        generator = torch.Generator().manual_seed(0)
        a, b, c = (
            (torch.randn(m_shape, generator=generator).double(), torch.randn(s_shape, generator=generator).double())
            for _ in range(3)
        )
        left = transition.compose(transition.compose(c, b), a)
        right = transition.compose(c, transition.compose(b, a))
        for x, y in zip(left, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
