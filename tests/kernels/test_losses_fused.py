"""The linear cross-entropy kernels, interpreted: whole heads, and heads in three shares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.kernels import linear_cross_entropy
from headrace.kernels.dispatch import use_backend
from headrace.kernels.launch import record_launches
from headrace.kernels.losses import linear_cross_entropy_reference
from headrace.kernels.losses.chunked import linear_cross_entropy_forward
from headrace.kernels.losses.rows import HeadShard, SoftmaxSums
from judge import assert_as_exact, poisoned_memory

pytestmark = pytest.mark.interpreted

D = 7


def make(T: int, V: int, *, ignored: float = 0.3, ignore_index: int = -100, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T * V)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64) * scale
    target_T = torch.randint(V, (T,), generator=generator)
    return x_TD, weight_VD, target_T.masked_fill(torch.rand(T, generator=generator) < ignored, ignore_index)


def judge(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100, **options: float) -> None:
    z_loss = options.get("z_loss", 0.0)
    assert_as_exact(
        lambda *t: linear_cross_entropy(*t, target, backend="triton", ignore_index=ignore_index, **options)[0],
        lambda *t: linear_cross_entropy_reference(*t, target, ignore_index, z_loss)[0],
        [x, weight],
    )


@pytest.mark.parametrize(
    ("T", "chunk_size", "z_loss"),
    [(1, 8, 0.0), (1, 1, 1e-2), (63, 64, 1e-2), (64, 64, 0.0), (100, 33, 1e-2), (5, 1, 0.0)],
)
def test_as_exact_as_the_definition(T: int, chunk_size: int, z_loss: float) -> None:
    judge(*make(T, 150), chunk_size=chunk_size, z_loss=z_loss)


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 129, 4099])
def test_any_number_of_rows(V: int) -> None:
    judge(*make(6, V), z_loss=1e-2)


@pytest.mark.parametrize("ignore_index", [-100, 0, 1, 5, 1 << 40])
def test_ignored_targets(ignore_index: int) -> None:
    x, weight, target = make(9, 20, ignore_index=ignore_index)
    judge(x, weight, target, ignore_index)
    x, weight = (t.float().requires_grad_() for t in (x, weight))
    loss, count = linear_cross_entropy(x, weight, target, ignore_index=ignore_index, backend="triton")
    assert count == (target != ignore_index).sum()
    (dx,) = torch.autograd.grad(loss, x)
    assert (dx == 0).all(1).equal(target == ignore_index)


def test_all_ignored_and_no_tokens() -> None:
    x, weight, target = make(9, 20, ignored=1.0)
    for T in (9, 0):
        leaves = [t.float().requires_grad_() for t in (x[:T], weight)]
        with poisoned_memory():
            loss, count = linear_cross_entropy(*leaves, target[:T], z_loss=1e-2, chunk_size=4, backend="triton")
            grads = torch.autograd.grad(loss, leaves)
        assert loss == count == 0
        assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


def test_logits_far_apart() -> None:
    judge(*make(20, 150, scale=100.0))
    x, weight, target = (torch.ones(2, 1), torch.full((80, 1), -1e30), torch.zeros(2, dtype=torch.int64))
    weight[3] = 1e30
    loss, _ = linear_cross_entropy(x, weight, target, backend="triton")
    assert loss == linear_cross_entropy_reference(x, weight, target)[0]


def test_gradient_only_where_asked() -> None:
    x, weight, target = make(10, 90)
    x, weight = (t.float().requires_grad_() for t in (x, weight))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, chunk_size=4, backend="triton")[0]

    whole = loss(x, weight)
    both = torch.autograd.grad(whole, (x, weight))
    assert torch.equal(torch.autograd.grad(loss(x, weight.detach()), x)[0], both[0])
    assert torch.equal(torch.autograd.grad(loss(x.detach(), weight), weight)[0], both[1])
    with torch.no_grad(), record_launches() as launches:
        assert torch.equal(loss(x, weight), whole)
    assert [one.arguments["WITH_GRADIENT"] for one in launches] == [False] * 3


def test_repeats_bit_for_bit_and_takes_views() -> None:
    x, weight, target = make(10, 90)
    wide = torch.randn(10, 3 * D)
    wide[:, D : 2 * D] = x
    spread = torch.zeros(20, dtype=torch.int64)
    spread[::2] = target

    def results(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaves = [x, weight.float()]
        leaves = [t.requires_grad_() for t in leaves]
        loss, _ = linear_cross_entropy(*leaves, target, chunk_size=4, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss * 3, leaves)

    first = results(x.float(), target)
    assert all(torch.equal(a, b) for a, b in zip(first, results(x.float(), target), strict=True))
    # Products may take another way through a view.
    for a, b in zip(first, results(wide[:, D : 2 * D].detach(), spread[::2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x, weight, target = (t.float() if t.is_floating_point() else t for t in make(4, 90, ignored=0.0))
    target[3] = -100
    x[1, 2] = x[3, 0] = bad
    loss_sum, _, dx, _ = linear_cross_entropy_forward(x, weight, target, -100, 4, 0.0, True, False, fused=True)
    assert not loss_sum.isfinite()
    assert dx.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("wrong", [-1, 90, 1 << 40])
def test_targets_outside_the_head_give_nan(wrong: int) -> None:
    x, weight, target = make(4, 90, ignored=0.0)
    leaves = [t.float().requires_grad_() for t in (x, weight)]
    target[2] = wrong
    loss, _ = linear_cross_entropy(*leaves, target, backend="triton")
    dx, dweight = torch.autograd.grad(loss, leaves)
    assert loss.isnan()
    assert dx.isnan().all(1).tolist() == [False, False, True, False]
    assert dweight.isnan().all()


def test_one_launch_a_chunk() -> None:
    x, weight, target = make(10, 90)
    leaves = [t.float().requires_grad_() for t in (x, weight)]
    with record_launches() as launches:
        loss, _ = linear_cross_entropy(*leaves, target, chunk_size=4, backend="triton")
        assert [(one.name, one.grid) for one in launches] == [("_cross_entropy_kernel", (n,)) for n in (4, 4, 2)]
        loss.backward()
    assert [one.name for one in launches[3:]] == ["_scale_kernel"] * 2


class ThreeShares(torch.autograd.Function):
    """The loss with the head split in three; every share goes over its rows twice, first to tell its sums."""

    @staticmethod
    def forward(ctx, x, weight, target, z_loss):  # type: ignore[no-untyped-def]
        x, weight = x.detach(), weight.detach()
        cuts = [slice(0, 65), slice(65, 66), slice(66, len(weight))]

        def run(rank: int, combine: Callable[[SoftmaxSums], SoftmaxSums]) -> tuple[Tensor, ...]:
            shard = HeadShard(cuts[rank].start, len(weight), combine)
            arguments = (x, weight[cuts[rank]], target, -100, 33, z_loss, True, True)
            return linear_cross_entropy_forward(*arguments, shard=shard, fused=True)

        told: list[list[SoftmaxSums]] = [[], [], []]
        for rank, sums in enumerate(told):
            run(rank, lambda mine, sums=sums: sums.append(mine) or mine)
        joined = [join(of_chunk) for of_chunk in zip(*told, strict=True)]
        results = [run(rank, replay(joined)) for rank in range(3)]
        losses, counts, dx, dweight = zip(*results, strict=True)
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
        assert counts[0] == (target != -100).sum()
        ctx.grads = torch.stack(dx).sum(0), torch.cat(dweight)
        return losses[0]

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        return *(grad * dloss for grad in ctx.grads), None, None


def replay(joined: list[SoftmaxSums]) -> Callable[[SoftmaxSums], SoftmaxSums]:
    left = iter(joined)
    return lambda _: next(left)


def join(shares: tuple[SoftmaxSums, ...]) -> SoftmaxSums:
    peak, total, chosen = (torch.stack(parts) for parts in zip(*shares, strict=True))
    highest = peak.amax(0)
    return SoftmaxSums(highest, (total * (peak - highest).exp()).sum(0), chosen.sum(0))


@pytest.mark.parametrize(("T", "z_loss", "ignored"), [(1, 0.0, 0.0), (36, 1e-2, 0.3), (5, 0.0, 1.0)])
def test_three_shares_as_exact_as_the_definition(T: int, z_loss: float, ignored: float) -> None:
    x, weight, target = make(T, 150, ignored=ignored)
    assert_as_exact(
        lambda *t: ThreeShares.apply(*t, target, z_loss),
        lambda *t: linear_cross_entropy_reference(*t, target, -100, z_loss)[0],
        [x, weight],
    )


def test_two_launches_a_chunk_with_shares() -> None:
    x, weight, target = (t.float() if t.is_floating_point() else t for t in make(10, 90))
    shard = HeadShard(0, 90, combine=lambda mine: mine)
    with record_launches() as launches:
        shared = linear_cross_entropy_forward(x, weight, target, -100, 5, 0.0, True, True, shard=shard, fused=True)
    assert [one.name for one in launches] == ["_softmax_sums_kernel", "_shard_gradient_kernel"] * 2
    for a, b in zip(shared, linear_cross_entropy_forward(x, weight, target, -100, 5, 0.0, True, True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrong", [-1, 180])
def test_targets_that_no_share_has_give_nan(wrong: int, fused: bool) -> None:
    x, weight, target = (t.float() if t.is_floating_point() else t for t in make(4, 90, ignored=0.0))
    target[2] = wrong
    shard = HeadShard(90, 180, combine=lambda mine: mine)
    loss, _, dx, _ = linear_cross_entropy_forward(x, weight, target, -100, 4, 0.0, True, True, shard=shard, fused=fused)
    assert loss.isnan()
    assert dx.isnan().all(1).tolist() == [False, False, True, False]


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    x, weight, target = (t.float().requires_grad_() if t.is_floating_point() else t for t in make(10, 90))
    operator = torch.ops.headrace.linear_cross_entropy.default
    torch.library.opcheck(operator, (x, weight, target, -100, 4, 1e-3, True, True, True))
    torch.library.opcheck(operator, (x.detach(), weight.detach(), target, -100, 4, 0.0, False, False, True))
    torch.library.opcheck(torch.ops.headrace.scale_gradient.default, (x.detach(), torch.tensor(3.0)))

    def loss_of(x: Tensor, weight: Tensor) -> Tensor:
        loss_sum, num_targets = linear_cross_entropy(torch.sin(x), weight, target, backend="triton")
        return loss_sum / num_targets

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss_of(x, weight), (x, weight))
    for a, e in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_bad_arguments_and_the_definition_as_backend() -> None:
    x, weight, target = (t.float() if t.is_floating_point() else t for t in make(10, 90))
    with pytest.raises(ValueError, match="Triton cannot run: float64"):
        linear_cross_entropy(x.double(), weight.double(), target, backend="triton")
    with pytest.raises(ValueError, match="give one dtype"):
        linear_cross_entropy(x, weight.double(), target, backend="triton")
    with pytest.raises(ValueError, match=r"target is torch.int32; give torch.int64"):
        linear_cross_entropy(x, weight, target.int(), backend="triton")
    huge = torch.empty(1 << 29, D, device="meta")
    with pytest.raises(ValueError, match="rows of a head are more than"):
        linear_cross_entropy(x, huge, target, backend="triton")
    with use_backend("reference"):
        assert torch.equal(
            linear_cross_entropy(x, weight, target)[0], linear_cross_entropy_reference(x, weight, target)[0]
        )
