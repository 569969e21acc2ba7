"""Low-rank optimizers: their papers' update on whole matrices, under every cut; skipping, resuming, bad input."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import low_rank_references as references
from headrace.data import Batch
from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.parallel.config import ParallelConfig
from headrace.parallel.mesh import build_mesh
from headrace.pretrain.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.build import build_optimizers
from headrace.pretrain.optimizers.config import OptimizerConfig
from headrace.pretrain.optimizers.low_rank.bases import leading_directions, sketch_size
from headrace.pretrain.optimizers.low_rank.config import LowRankConfig, MethodName
from headrace.pretrain.optimizers.low_rank.layout import MatrixLayout
from headrace.pretrain.optimizers.low_rank.optimizer import LowRank
from low_rank_cases import CASES, CODED, CODED_NAMES, GO, LR_SCALES, NAMES, SKIP, STEPS, build, draw, take_steps
from spread import Case, Rows, build_engine
from tiny import this_world


def reference_run(config: LowRankConfig) -> dict[str, Tensor]:
    return references.train(config, draw(0), [draw(100 + step) for step in range(STEPS)], LR_SCALES, 0.1)


@pytest.mark.parametrize("config", CASES, ids=NAMES)
def test_equals_the_papers_equations(config: LowRankConfig) -> None:
    parameters = draw(0)
    take_steps(build(config, parameters), range(STEPS))
    for name, expected in reference_run(config).items():
        torch.testing.assert_close(parameters[name], expected, rtol=1e-10, atol=1e-10)


@dataclass(frozen=True)
class Cut:
    """A mesh, how matrices and stacks lie on it, and which of `SHAPES` the comparison takes."""

    mesh: tuple[int, ...]
    matrix: tuple[Placement, ...]
    stack: tuple[Placement, ...]
    shapes: tuple[str, ...]


CUTS = {
    "dp2": Cut((2,), (Shard(0),), (Shard(0),), ("tall", "uneven", "stack")),
    "tp2 columns": Cut((2,), (Shard(1),), (Shard(2),), ("tall", "uneven", "stack")),
    "dp4": Cut((4,), (Shard(0),), (Shard(1),), ("narrow", "few", "stack")),
    "replicas and dp": Cut((2, 2), (Replicate(), Shard(0)), (Replicate(), Shard(2)), ("tall",)),
    "dp and tp columns": Cut((2, 2), (Shard(0), Shard(1)), (Shard(0), Shard(2)), ("uneven", "stack")),
    "dp and tp rows": Cut(
        (2, 2), (_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(1)), ("tall", "stack")
    ),
}


def cutter(cut: Cut) -> Callable[[str, Tensor], Tensor]:
    mesh = init_device_mesh("cpu", cut.mesh, mesh_dim_names=("first", "second")[: len(cut.mesh)])

    def shard(name: str, tensor: Tensor) -> Tensor:
        placements = cut.stack if tensor.ndim == 3 else cut.matrix
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    return shard


def sharded_runs(configs: list[LowRankConfig], cuts: list[Cut]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Whole parameters and state after all steps, of each method under each cut."""
    found = []
    for cut in cuts:
        shard = cutter(cut)
        for config in configs:
            parameters: dict[str, Tensor] = {name: shard(name, draw(0)[name]) for name in cut.shapes}
            optimizer = build(config, parameters)
            take_steps(optimizer, range(STEPS), shard)
            found.append(tuple({n: whole(t) for n, t in some.items()} for some in (parameters, optimizer.state())))
    return found  # type: ignore[return-value]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_cut_changes_the_update(gloo: Callable, ranks: int) -> None:
    """Whole state too: what is saved under one layout is what another loads."""
    configs = CASES + CODED
    cuts = {name: cut for name, cut in CUTS.items() if torch.Size(cut.mesh).numel() == ranks}
    expected, states = [], []
    for config in configs:
        optimizer = build(config, draw(0))
        take_steps(optimizer, range(STEPS))
        # Codes may fall to either side of a threshold for a reference that rounds differently.
        expected.append(reference_run(config) if config.state_bits == 32 else optimizer.parameters)
        states.append(optimizer.state())
    for rank, found in enumerate(gloo(ranks, sharded_runs, configs, list(cuts.values()), timeout_s=200)):
        for i, (parameters, state) in enumerate(found):
            cut, case = list(cuts)[i // len(configs)], i % len(configs)
            where = f"rank {rank}, {cut}, {configs[case].method}: "
            for name, tensor in parameters.items():
                assert_close(tensor, expected[case][name], where + name)
            shapes = CUTS[cut].shapes
            assert state.keys() == {name for name in states[case] if name.partition(".")[2] in shapes}
            for name, tensor in state.items():
                assert_close(tensor, states[case][name], where + name)


def assert_close(found: Tensor, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{where}: {text}")


def test_large_state_is_cut_where_the_parameter_is(gloo: Callable) -> None:
    """Neither moments nor bases are on two ranks."""
    for config, (mine, every) in zip(CASES, gloo(2, state_elements)[0], strict=True):
        assert mine <= every / 2 + 2 * (4 + 8), config.method


def state_elements() -> list[tuple[int, int]]:
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for config in CASES:
        mine = every = 0
        for dim in (0, 1):
            parameter = distribute_tensor(torch.zeros(8, 8), mesh, [Shard(dim)], src_data_rank=None)
            state = build(replace(config, rank=4), {"square": parameter}).state()
            for tensor in state.values():
                if isinstance(tensor, DTensor):
                    mine += tensor.to_local().numel()
                    every += tensor.numel()
        found.append((mine, every))
    return found


@pytest.mark.parametrize("config", [*CASES, *CODED], ids=[*NAMES, *CODED_NAMES])
def test_a_skipped_update_never_was(config: LowRankConfig) -> None:
    """Not finite gradients before every update, of which some choose a basis: no bit differs."""
    expected = build(config, draw(0))
    take_steps(expected, range(STEPS))
    skipping = build(config, draw(0))
    for step in range(STEPS):
        before = copy.deepcopy((skipping.parameters, skipping.state()))
        for parameter in skipping.parameters.values():
            parameter.grad = torch.full_like(parameter, float("nan") if step % 2 else float("inf"))
        skipping.step(1.0, SKIP)
        assert_equal(before, (skipping.parameters, skipping.state()))
        take_steps(skipping, range(step, step + 1))
    assert_equal((expected.parameters, expected.state()), (skipping.parameters, skipping.state()))


@pytest.mark.parametrize("config", [*CASES, *CODED], ids=[*NAMES, *CODED_NAMES])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_loaded_state_goes_on_bit_for_bit(config: LowRankConfig, stop: int) -> None:
    expected = build(config, draw(0))
    take_steps(expected, range(STEPS))
    first = build(config, draw(0))
    take_steps(first, range(stop))
    resumed = build(config, copy.deepcopy(first.parameters))
    assert resumed.state().keys() == first.state().keys()
    for name, tensor in resumed.state().items():
        tensor.copy_(first.state()[name])
    take_steps(resumed, range(stop, STEPS))
    assert_equal((expected.parameters, expected.state()), (resumed.parameters, resumed.state()))


def assert_equal(expected: tuple[dict[str, Tensor], ...], found: tuple[dict[str, Tensor], ...]) -> None:
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name


def test_a_checkpoint_loads_under_another_cut(gloo: Callable, tmp_path: Path) -> None:
    """Saved by four ranks that cut rows twice and loaded by two that cut columns, then trained on."""
    configs = [config for config in [*CASES, *CODED] if config.method in ("grass_walk", "subspace_momentum", "flora")]
    gloo(4, save_states, configs, CUTS["dp and tp rows"], tmp_path)
    for parameters, config in zip(gloo(2, go_on, configs, CUTS["tp2 columns"], tmp_path)[0], configs, strict=True):
        expected = build(config, draw(0))
        take_steps(expected, range(STEPS))
        for name, tensor in parameters.items():
            assert_close(tensor, expected.parameters[name], f"{config.method} {name}")


def cut_optimizer(config: LowRankConfig, shard: Callable[[str, Tensor], Tensor]) -> LowRank:
    return build(config, {name: shard(name, tensor) for name, tensor in draw(0).items()})


def save_states(configs: list[LowRankConfig], cut: Cut, folder: Path) -> None:
    shard = cutter(cut)
    for number, config in enumerate(configs):
        optimizer = cut_optimizer(config, shard)
        take_steps(optimizer, range(3), shard)
        tensors = {**optimizer.parameters, **optimizer.state()}
        save_checkpoint(folder / str(number), 3, tensors, extra={})


def go_on(configs: list[LowRankConfig], cut: Cut, folder: Path) -> list[dict[str, Tensor]]:
    shard, found = cutter(cut), []
    for number, config in enumerate(configs):
        optimizer = cut_optimizer(config, shard)
        path = latest_checkpoint(folder / str(number))
        assert path is not None
        load_checkpoint(path, {**optimizer.parameters, **optimizer.state()})
        take_steps(optimizer, range(3, STEPS), shard)
        found.append({name: whole(tensor) for name, tensor in optimizer.parameters.items()})
    return found


MODEL = ModelConfig(
    vocab_size=40,
    d_model=16,
    pattern="mamba2 moe attention",
    mamba2=Mamba2Config(head_dim=4, d_state=8, num_groups=2, chunk_size=4),
    attention=AttentionConfig(num_heads=4, rope_fraction=1.0),
    moe=MoEConfig(num_experts=4, top_k=2, d_hidden=12),
)


def model_run(parallel: ParallelConfig, method: MethodName) -> dict[str, Tensor]:
    """A model's parameters after three real updates, two bases."""
    world = this_world()
    case = Case(model=MODEL, parallel=parallel, rows=Rows(4, 12))
    mesh = build_mesh(parallel, world)
    engine = build_engine(case, mesh, world)
    low_rank = LowRankConfig(method=method, rank=3, min_side=8, refresh_steps=2)
    optimizers = build_optimizers(engine.models, OptimizerConfig(kind="low_rank", low_rank=low_rank))
    assert [type(optimizer) for optimizer in optimizers] == [AdamW, LowRank]
    batch = [tensor[mesh.data_rank :: mesh.data_ranks] for tensor in case.rows.tensors(MODEL.vocab_size)]
    for _ in range(3):
        engine.forward_backward(Batch(*batch, 0))
        for optimizer in optimizers:
            optimizer.step(1.0, GO)
        engine.zero_grad()
    return {name: whole(parameter.detach()) for name, parameter in engine.named_parameters().items()}


@pytest.mark.parametrize("method", ["galore", "grass_jump"])
def test_a_spread_model_trains_as_one_process_does(gloo: Callable, method: MethodName) -> None:
    """Under FSDP with tensor and expert parallelism, matrices and experts."""
    (expected,) = gloo(1, model_run, ParallelConfig(), method)
    assert sum(tensor.ndim == 3 for tensor in expected.values()) >= 2
    for found in gloo(4, model_run, ParallelConfig(tp=2, ep=2), method):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-7, msg=name)


def test_a_rank_that_does_not_fit_is_said() -> None:
    parameters = {"layers.0.mixer.in_dt.weight": torch.zeros(12, 192), "layers.0.up": torch.zeros(64, 32)}
    expected = r"optimizer.low_rank.rank=16 is above the smaller size of layers.0.mixer.in_dt.weight \(12 x 192\); "
    with pytest.raises(UserError, match=expected + "set it to 12 or less, or optimizer.low_rank.min_side=16"):
        build(LowRankConfig(rank=16), parameters)
    build(LowRankConfig(method="subset_norm", rank=16), parameters)


def test_numbers_out_of_range_are_said() -> None:
    config = LowRankConfig(rank=0, refresh_steps=0, lr=0.0, growth_limit=1.0, basis_penalty=-1.0, seed=-1, min_side=-1)
    assert len(config.problems()) == 7
    assert "optimizer.low_rank.rank=0 must be at least 1" in OptimizerConfig(low_rank=config).problems()


def test_randomised_directions_hold_nearly_all_that_a_subspace_can() -> None:
    """With far fewer test vectors than rows, on a spectrum that falls slowly."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(90, 90, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    sizes = torch.arange(1, 91, dtype=torch.float64) ** -0.5
    gradient = (left * sizes) @ right.mT
    layout = MatrixLayout(gradient)
    test = torch.randn(1, 90, sketch_size(10, 90), generator=generator, dtype=torch.float64)
    basis = leading_directions(layout, gradient[None], 10, test)[0]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(10, dtype=torch.float64))
    held, best = (basis.mT @ gradient).square().sum(), sizes[:10].square().sum()
    assert 0.95 * best < held <= best * (1 + 1e-12)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("config", [*CASES, *CODED], ids=[*NAMES, *CODED_NAMES])
def test_half_precision_weights_have_float32_state(config: LowRankConfig) -> None:
    parameters = {name: tensor.bfloat16() for name, tensor in draw(0).items()}
    optimizer = build(config, parameters)
    for step in range(STEPS):
        for name, grad in draw(100 + step).items():
            parameters[name].grad = grad.bfloat16()
        optimizer.step(1.0, GO)
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in parameters.values())
    assert not any(tensor.dtype == torch.bfloat16 for tensor in optimizer.state().values())
    exact = draw(0)
    take_steps(build(config, exact), range(STEPS))
    for name, tensor in parameters.items():
        assert (tensor - exact[name]).norm() < 0.02 * exact[name].norm(), name
