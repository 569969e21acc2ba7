"""One float64 training step through pipeline stages, and evaluation through them, equal one process."""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.lm import HybridLM
from headrace.model.mixers.attention import AttentionConfig, SlidingAttentionConfig
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.sequence import LayerStates, SequenceContext
from headrace.parallel.config import ParallelConfig
from headrace.parallel.fsdp import materialise
from headrace.parallel.mesh import Mesh, build_mesh
from headrace.parallel.pipeline import Pipeline, SplitBackward
from headrace.parallel.recompute import Recompute
from headrace.parallel.spread import spread_model
from headrace.parallel.stages import cut_stages, stages_of_rank
from headrace.parallel.tensor import sum_replicated_gradients
from spread import Rows, Step, differences, one_process
from tiny import this_world

L = 22
SMALL = {
    "mamba2": Mamba2Config(head_dim=4, d_state=5, num_groups=2, chunk_size=8, bias=True),
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope_fraction=1.0),
    "sliding_attention": SlidingAttentionConfig(num_heads=4, window=5),
}
TIED = ModelConfig(
    vocab_size=38, d_model=12, pattern="mamba2 attention mlp 2*mamba2 sliding_attention mlp mamba2", **SMALL
)
UNTIED = replace(TIED, tie_embeddings=False)


@dataclass(frozen=True)
class Case:
    """A layout and how rows go through it."""

    parallel: ParallelConfig
    model: ModelConfig = TIED
    micro_rows: int = 1
    recompute: Recompute = "none"
    steps: int = 1


def looped(schedule: str = "interleaved", **degrees: int | str) -> ParallelConfig:
    return ParallelConfig(pp=2, pp_stages=2, pp_schedule=schedule, **degrees)  # type: ignore[arg-type]


def build(case: Case, compute_dtype: torch.dtype = torch.float32) -> tuple[Pipeline, Mesh, list[HybridLM]]:
    """This rank's stages, float64 unless they compute in something narrower than float32."""
    world = this_world()
    mesh = build_mesh(case.parallel, world)
    cuts = cut_stages(case.model, case.parallel.num_stages, L)
    mine = stages_of_rank(case.parallel, mesh.rank("pp"))
    models = []
    for stage in mine:
        with torch.device("meta"):
            model = HybridLM(case.model, cuts[stage])
        if compute_dtype == torch.float32:
            model.double()
        spread_model(model, mesh, case.parallel, compute_dtype=compute_dtype, recompute=case.recompute)
        materialise(model, world.device, 7)
        models.append(model)
    pipeline = Pipeline(list(zip(mine, models, strict=True)), mesh, case.parallel, compute_dtype=compute_dtype)
    return pipeline, mesh, models


def pipeline_step(
    case: Case, rows: Rows, compute_dtype: torch.dtype = torch.float32
) -> tuple[Step, dict[str, torch.Tensor] | None]:
    """The loss, the gradients of this rank's stages, whole, and that of the head's copy of a tied matrix."""
    pipeline, mesh, models = build(case, compute_dtype)
    tokens, targets, reset = rows.tensors(case.model.vocab_size)
    count = int((targets != -100).sum())
    share = slice(mesh.data_rank, None, mesh.data_ranks)
    mine = reset[share] if rows.starts else None
    for _ in range(case.steps):
        for model in models:
            model.zero_grad()
        options = {"micro_rows": case.micro_rows, "scale": torch.tensor(mesh.grad_ranks / count, dtype=torch.float64)}
        number = torch.arange(tokens.numel()).view_as(tokens)
        loss_sum = pipeline.step(tokens[share], targets[share], mine, number_BL=number[share], **options)
        for model in models:
            sum_replicated_gradients(model, mesh)
        pipeline.sum_tied_gradients()
    total = loss_sum.double() / count / mesh.size("tp")
    dist.all_reduce(total)
    gradients: dict[str, torch.Tensor] = {}
    copy = None
    for model in models:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor), name
            whole = parameter.grad.full_tensor()
            if name == "embed.weight" and not model.is_first:
                copy = whole
            else:
                gradients[name] = whole
    return (float(total), gradients), copy


def check_step(gloo: Callable, world_size: int, case: Case, rows: Rows, limit: float = 1e-9) -> None:
    """Loss and gradients against one process; who owns what; the two ends of a tied matrix against each other."""
    expected = one_process(case.model, rows)
    results = gloo(world_size, pipeline_step, case, rows)
    cuts = cut_stages(case.model, case.parallel.num_stages, L)
    whole: set[str] = set()
    copies = []
    for rank, ((loss, gradients), copy) in enumerate(results):
        # pp is the outermost axis.
        stages = stages_of_rank(case.parallel, rank // (world_size // case.parallel.pp))
        owned = {str(i) for stage in stages for i in cuts[stage]}
        assert {name.split(".")[1] for name in gradients if name.startswith("layers.")} == owned
        assert ("embed.weight" in gradients) == (0 in stages)
        last = case.parallel.num_stages - 1 in stages
        assert ("norm.weight" in gradients) == last
        assert (copy is not None) == (last and case.model.tie_embeddings)
        known = {name: expected[1][name] for name in gradients}
        assert not differences((loss, gradients), (expected[0], known), limit)
        whole |= gradients.keys()
        copies += [copy] if copy is not None else []
    assert whole == expected[1].keys()
    assert all(torch.equal(copy, results[0][0][1]["embed.weight"]) for copy in copies)


PLAIN, PACKED = Rows(4, L), Rows(4, L, starts=(0, 5, 6, 13))

CASES = {
    "1f1b": (2, Case(ParallelConfig(pp=2)), PACKED),
    "1f1b, untied, uneven last micro-batch, twice": (2, Case(ParallelConfig(pp=2), UNTIED, 3, steps=2), PACKED),
    "1f1b over four, one document a row": (4, Case(ParallelConfig(pp=4)), PLAIN),
    "1f1b over four, recompute": (4, Case(ParallelConfig(pp=4), UNTIED, recompute="full"), PACKED),
    "interleaved": (2, Case(looped()), PACKED),
    "interleaved, untied, recompute selectively": (2, Case(looped(), UNTIED, recompute="selective"), PACKED),
    "interleaved over four": (
        4,
        Case(ParallelConfig(pp=4, pp_stages=2, pp_schedule="interleaved"), micro_rows=2),
        Rows(7, L, starts=(9,)),
    ),
    # With three stages a rank, a stage goes forward between the halves of one of its backward passes.
    "zero bubble": (2, Case(ParallelConfig(pp=2, pp_stages=3, pp_schedule="zero_bubble"), steps=2), PACKED),
    "zero bubble, untied, uneven last micro-batch": (2, Case(looped("zero_bubble"), UNTIED, 2), Rows(7, L)),
    "tp": (4, Case(ParallelConfig(pp=2, tp=2)), PACKED),
    "tp, interleaved": (4, Case(looped(tp=2), UNTIED), PACKED),
    "tp, zero bubble": (4, Case(looped("zero_bubble", tp=2)), PACKED),
    "cp": (4, Case(ParallelConfig(pp=2, cp=2, cp_layout="zigzag")), PACKED),
    "cp, interleaved, recompute": (
        4,
        Case(looped(cp=2, cp_layout="zigzag"), UNTIED, recompute="full"),
        PACKED,
    ),
    "cp, zero bubble": (4, Case(looped("zero_bubble", cp=2, cp_layout="zigzag")), PACKED),
    "virtual segments, zero bubble": (2, Case(looped("zero_bubble", cp_virtual=3)), PACKED),
    "dp_shard": (4, Case(ParallelConfig(pp=2, dp_shard=2), steps=2), Rows(6, L, starts=(3, 9))),
    "dp_shard, zero bubble": (4, Case(looped("zero_bubble", dp_shard=2)), Rows(8, L, starts=(3, 9))),
    "dp_replicate": (4, Case(looped(dp_replicate=2)), Rows(6, L, starts=(3, 9))),
    "everything": (8, Case(looped("zero_bubble", cp=2, tp=2, cp_layout="zigzag")), PACKED),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if case[0] > 4 else name for name, case in CASES.items()]
)
def test_one_step_equals_one_process(gloo: Callable, name: str) -> None:
    check_step(gloo, *CASES[name])


def bfloat16_gradients(case: Case, rows: Rows) -> dict[str, torch.Tensor]:
    (_, gradients), _ = pipeline_step(case, rows, torch.bfloat16)
    return gradients


def test_no_schedule_adds_up_in_bfloat16(gloo: Callable) -> None:
    """Sums over micro-batches in bfloat16 would differ; so would a recomputation with other weights."""
    rows = Rows(8, L, starts=(0, 5))
    cases = [
        Case(looped()),
        Case(looped("zero_bubble")),
        Case(looped(), recompute="full"),
        Case(looped(), recompute="selective"),
        Case(ParallelConfig(pp=2)),
        Case(ParallelConfig(pp=2), recompute="selective"),
    ]
    first, *others = (dict(ChainMap(*gloo(2, bfloat16_gradients, case, rows))) for case in cases)
    for gradients in others:
        assert gradients.keys() == first.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert float((gradient - first[name]).norm() / first[name].norm()) < 1e-5, name
    _, expected = one_process(TIED, rows)
    assert all(float((first[name] - expected[name]).norm() / expected[name].norm()) < 0.3 for name in first)


class TwoOutputs(torch.autograd.Function):
    """An operator with a parameter whose outputs get different gradients."""

    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x @ w, x * w.sum()

    @staticmethod
    def backward(ctx, dy, dz):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return dy @ w.T + dz * w.sum(), x.T @ dy + (dz * x).sum()


def residual(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y, z = TwoOutputs.apply(x, a)
    return x + torch.tanh(y) @ b * z + c


def shared_across(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a` and `b` are used in turns, so that each has forks between those of the other; `c` joins both."""
    for w in (a, b, a, b):
        x = torch.tanh(x.addmm(x, w + c)) + x
    return x


@pytest.mark.parametrize("stage", [residual, shared_across])
def test_a_backward_pass_in_halves_gives_the_same_gradients(stage: Callable) -> None:
    generator = torch.Generator().manual_seed(1)
    x, *ws = (torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(4))
    dy = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(stage(x, *ws), (x, *ws), dy)
    for times in (1, 2):
        split = SplitBackward(stage(x, *ws), x)
        torch.testing.assert_close(split.to_inflow(dy), expected[0])
        assert all(w.grad is None for w in ws) or times == 2
        split.to_parameters()
        assert x.grad is None
        for w, gradient in zip(ws, expected[1:], strict=True):
            torch.testing.assert_close(w.grad, times * gradient)


def windows(case: Case, rows: Rows, bounds: list[int]) -> list[tuple[float, int]]:
    """Loss and targets of rows in pieces, states carried through the stages."""
    pipeline, _, models = build(case)
    tokens, targets, _ = rows.tensors(case.model.vocab_size)
    states = [LayerStates() for _ in models]
    found = []
    for start, stop in pairwise(bounds):
        loss_sum, count = pipeline.forward_only(tokens[:, start:stop], targets[:, start:stop], states)
        assert count.dtype == torch.int64
        found.append((float(loss_sum), int(count)))
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, ParallelConfig(pp=2)), (2, looped("zero_bubble")), (4, ParallelConfig(pp=2, tp=2)), (4, looped(cp=2))],
    ids=["1f1b", "zero bubble", "tp", "cp"],
)
def test_evaluation_through_the_stages_equals_one_process(
    gloo: Callable, world_size: int, parallel: ParallelConfig
) -> None:
    rows, bounds = Rows(1, L), [0, 9, 10, 21, 22]
    model = HybridLM(TIED).double()
    model.initialize(7)
    tokens, targets, _ = rows.tensors(TIED.vocab_size)
    states = LayerStates()
    expected = []
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            loss_sum, count = model(tokens[:, start:stop], SequenceContext(states=states), targets[:, start:stop])
            expected.append((float(loss_sum), int(count)))
    for found in gloo(world_size, windows, Case(parallel), rows, bounds):
        assert [count for _, count in found] == [count for _, count in expected]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-9)


def refused(case: Case, rows: Rows) -> str:
    try:
        pipeline_step(case, rows)
    except UserError as error:
        return str(error)
    return ""


def test_too_few_micro_batches_are_refused_on_every_rank(gloo: Callable) -> None:
    for message in gloo(2, refused, Case(ParallelConfig(pp=2), micro_rows=4), PLAIN):
        assert "fewer than the pp=2 ranks" in message
