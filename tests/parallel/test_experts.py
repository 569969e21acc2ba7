"""Mixture-of-experts layers under every layout: one process's loss and gradients, whatever the router's variant."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.model.config import ModelConfig
from headrace.model.ffns.moe import Experts, MoEConfig
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.sequence import SequenceContext
from headrace.parallel.config import ParallelConfig
from headrace.parallel.dispatch import dispatch_over_ranks
from headrace.parallel.mesh import World, build_mesh
from headrace.parallel.recompute import Recompute
from headrace.parallel.traffic import Traffic
from spread import Case, Rows, largest_errors, one_process

ROWS = Rows(4, 29, (0, 3, 7, 8, 9, 14, 15, 16, 21, 27))


def model(pattern: str = "mamba2 moe", **moe: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        d_model=16,
        pattern=pattern,
        mamba2=Mamba2Config(head_dim=4, d_state=5, num_heads=4, chunk_size=8),
        moe=MoEConfig(**{"num_experts": 4, "top_k": 2, "d_hidden": 8, **moe}),
    )


ROUTERS = {
    "renormalised": model(renormalize=True, z_loss=0.01, d_shared=8),
    "switch": model(top_k=1, activation="gelu", jitter=0.1, balance_scope="batch"),
    "sigmoid": model(
        activation="relu2", score="sigmoid", renormalize=True, scale=2.5, num_groups=2, balance="bias", d_shared=4
    ),
    "sinkhorn": model(top_k=1, score="sigmoid", balance="sinkhorn"),
    "chunks": model(chunk=5, z_loss=0.1),
}
# Where rows are in flight apart from each other, loads are counted by row.
DEGREES: tuple[dict[str, object], ...] = (
    {"tp": 2},
    {"tp": 4},
    {"cp": 2, "cp_layout": "zigzag"},
    {"dp_shard": 2},
    {"dp_replicate": 2},
    {"dp_shard": 4, "cp": 2},  # fewer experts than ranks that shard them
    {"dp_shard": 2, "tp": 2, "cp": 2, "ep": 2},
    {"dp_shard": 2, "ep": 2},
    {"dp_shard": 4, "ep": 4},
    {"cp": 2, "ep": 2},
    {"cp": 4, "cp_layout": "zigzag", "ep": 4},
    {"tp": 2, "dp_shard": 2, "ep": 2},
    {"tp": 2, "ep": 2, "ep_over_tp": True},
    {"tp": 2, "ep": 1, "ep_over_tp": True},
    {"tp": 2, "cp": 2, "ep": 4, "ep_over_tp": True},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
)


def ranks_of(degrees: dict[str, Any]) -> int:
    ranks = 1
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        ranks *= int(degrees.get(axis, 1))
    return ranks


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: " ".join(f"{k}={v}" for k, v in d.items()))
def test_every_router_equals_one_process(gloo: Callable, degrees: dict[str, Any]) -> None:
    parallel = ParallelConfig(**{"dp_shard": 1, **degrees})
    cases = [Case(model=config, parallel=parallel, rows=ROWS) for config in ROUTERS.values()]
    steps = [one_process(case.model, ROWS) for case in cases]
    by_rank = gloo(ranks_of(degrees), largest_errors, cases, steps, timeout_s=120)
    for name, step, errors in zip(ROUTERS, steps, zip(*by_rank, strict=True), strict=True):
        assert set().union(*errors) == {"loss", *step[1]}, f"{name}: gradients are missing"
        worst = max((error, parameter) for part in errors for parameter, error in part.items())
        assert worst[0] <= 1e-9, f"{name}: {worst[1]} is off by {worst[0]:.1e}"


# The last with a micro-batch that is filled up by rows that must not count.
PIPELINES: tuple[tuple[dict[str, Any], int], ...] = (
    ({"pp": 2, "dp_shard": 2, "ep": 2}, 1),
    ({"pp": 2, "tp": 2}, 2),
    ({"pp": 2, "pp_stages": 2, "pp_schedule": "interleaved", "cp": 2, "ep": 2}, 1),
    ({"pp": 2, "pp_stages": 2, "pp_schedule": "zero_bubble", "dp_shard": 2, "ep": 2}, 1),
    ({"pp": 2}, 3),
)


@pytest.mark.parametrize(("degrees", "micro_rows"), PIPELINES, ids=str)
def test_stages_equal_one_process(gloo: Callable, degrees: dict[str, Any], micro_rows: int) -> None:
    parallel = ParallelConfig(**{"dp_shard": 1, **degrees})
    by_row = {name: config for name, config in ROUTERS.items() if config.moe.balance_scope == "row"}
    configs = [replace(config, pattern="2*(mamba2 moe)") for config in by_row.values()]
    cases = [Case(model=config, parallel=parallel, rows=ROWS, micro_rows=micro_rows) for config in configs]
    steps = [one_process(case.model, ROWS) for case in cases]
    by_rank = gloo(ranks_of(degrees), largest_errors, cases, steps, timeout_s=120)
    for name, step, errors in zip(by_row, steps, zip(*by_rank, strict=True), strict=True):
        assert set().union(*errors) == {"loss", *step[1]}, f"{name}: gradients are missing"
        worst = max((error, parameter) for part in errors for parameter, error in part.items())
        assert worst[0] <= 1e-9, f"{name}: {worst[1]} is off by {worst[0]:.1e}"


@pytest.mark.parametrize(("recompute", "compiled"), [("full", False), ("selective", False), ("none", True)])
def test_recomputation_and_compilation_change_nothing(gloo: Callable, recompute: Recompute, compiled: bool) -> None:
    parallel = ParallelConfig(dp_shard=2, ep=2)
    cases = [
        Case(model=ROUTERS[name], parallel=parallel, rows=ROWS, recompute=recompute, compile=compiled)
        for name in ("renormalised", "sigmoid")[: 1 if compiled else 2]
    ]
    steps = [one_process(case.model, ROWS) for case in cases]
    for found in gloo(2, largest_errors, cases, steps, timeout_s=200):
        for errors in found:
            assert max(errors.values()) <= 1e-9


WIDTH, TOKENS = 16, 24


def dispatched(scatter: bool) -> tuple[list[int], list[int]]:
    """Bytes of the all-to-alls of one layer, forward and backward, and what they must be. Collective over 4 ranks."""
    mesh = build_mesh(ParallelConfig(dp_shard=4, ep=4), World(dist.get_rank(), 4, torch.device("cpu")))
    group, rank = mesh.group("ep"), mesh.rank("ep")
    config = MoEConfig(num_experts=12, top_k=3, d_hidden=8)
    experts = Experts(config, WIDTH)
    for name, parameter in list(experts.named_parameters()):
        own = torch.randn(3, *parameter.shape[1:], generator=torch.Generator().manual_seed(rank))
        experts.register_parameter(name, torch.nn.Parameter(own))
    generator = torch.Generator().manual_seed(10 + rank)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weights_Tk = torch.rand(TOKENS, 3, generator=generator).requires_grad_()
    experts_Tk = torch.rand(TOKENS, 12, generator=generator).topk(3).indices
    if not scatter:  # all choices of a token on one rank
        experts_Tk = experts_Tk[:, :1] // 3 * 3 + torch.arange(3)
    with Traffic(mesh) as traffic:
        seq = SequenceContext()
        out_TD, _ = dispatch_over_ranks(experts, x_TD, experts_Tk, weights_Tk, seq, lambda: None, group=group)
        out_TD.square().sum().backward()
    away = sum(len({int(e) // 3 for e in token} - {rank}) for token in experts_Tk)
    back = torch.zeros(4, dtype=torch.int64)
    for token in experts_Tk:
        for other in {int(e) // 3 for e in token} - {rank}:
            back[other] += 1
    dist.all_reduce(back, group=group)  # rows that come here, and go home
    vectors, home = away * WIDTH * 4, int(back[rank]) * WIDTH * 4
    counts = 3 * 2 * 8
    forward = [counts, vectors, away * 3 * 4, away * 3 * 4, home]
    return [s.sent for s in traffic.sent if s.kind == "all_to_all"], [*forward, vectors, home, int(back[rank]) * 3 * 4]


@pytest.mark.parametrize("scatter", [True, False])
def test_a_token_goes_once_to_each_rank_that_wants_it(gloo: Callable, scatter: bool) -> None:
    for sent, expected in gloo(4, dispatched, scatter):
        assert sorted(sent) == sorted(expected)


def lonely(tokens: int) -> tuple[torch.Tensor, list[bool]]:
    """Fewer tokens than ranks, and all of them to one expert; a bystander's expert gets a gradient of zeros."""
    group = build_mesh(ParallelConfig(dp_shard=4, ep=4), World(dist.get_rank(), 4, torch.device("cpu"))).group("ep")
    experts = Experts(MoEConfig(num_experts=4, top_k=1, d_hidden=8), WIDTH)
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, torch.nn.Parameter(torch.ones(1, *parameter.shape[1:])))
    x_TD = torch.ones(tokens, WIDTH).requires_grad_()
    choice = torch.full((tokens, 1), 2), torch.ones(tokens, 1)
    out_TD, _ = dispatch_over_ranks(experts, x_TD, *choice, SequenceContext(), lambda: None, group=group)
    out_TD.sum().backward()
    return out_TD.detach(), [bool(p.grad.any()) for p in experts.parameters() if p.grad is not None]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_all_to_one_expert(gloo: Callable, tokens: int) -> None:
    for rank, (out, moved) in enumerate(gloo(4, lonely, tokens)):
        assert out.shape == (tokens, WIDTH)
        assert bool(out.any()) is (tokens > 0)
        assert moved == [rank == 2 and tokens > 0] * 3
