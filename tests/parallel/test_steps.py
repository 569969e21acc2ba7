"""Micro-batches, recomputation, first values and mixed precision do not depend on the layout."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.lm import HybridLM
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.sequence import SequenceContext
from headrace.parallel.config import ParallelConfig
from headrace.parallel.fsdp import materialise
from headrace.parallel.mesh import World, build_mesh
from headrace.parallel.recompute import Recompute, recompute_blocks
from headrace.parallel.spread import spread_model
from spread import Case, Rows, largest_errors, one_process, spread_step
from tiny import this_world

B, L = 8, 21


def model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=42,
        d_model=12,
        pattern="mamba2 attention mlp mamba1",
        mamba2=Mamba2Config(head_dim=4, d_state=5, num_groups=2, chunk_size=8),
        mamba1=Mamba1Config(d_state=3, dt_rank=2, inner_norms=True),
        attention=AttentionConfig(num_heads=6, rope_fraction=1.0),
        mlp=MLPConfig(d_hidden=18),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows with ignored targets, unevenly spread, so that a mean of means would differ."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(42, (B, L), generator=generator)
    targets = torch.randint(42, (B, L), generator=generator)
    targets[0, 3:] = -100
    targets[5] = -100
    reset = torch.rand(B, L, generator=generator) < 0.15
    return tokens, targets, reset


GATED_LAST = replace(
    model_config(),
    mamba2=Mamba2Config(num_heads=6, head_dim=4, d_state=5, gated_norm="whole", norm_before_gate=True),
)
ROWS = Rows(8, 21, (0, 3, 4, 11, 16))
BARE = replace(
    model_config(),
    mamba2=Mamba2Config(
        num_heads=6, head_dim=4, d_state=5, d_conv=1, conv_bias=False, skip="none", gated_norm="none", num_groups=3
    ),
)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_norm_over_all_ranks_before_the_gate(gloo: Callable, tp: int) -> None:
    case = Case(model=GATED_LAST, parallel=ParallelConfig(tp=tp), rows=ROWS)
    for errors in gloo(tp, largest_errors, [case], [one_process(GATED_LAST, ROWS)]):
        assert max(errors[0].values()) <= 1e-9, errors


@pytest.mark.parametrize("parallel", [ParallelConfig(cp=2), ParallelConfig(tp=2), ParallelConfig(cp_virtual=20)])
def test_a_mixer_without_taps_skip_or_norm(gloo: Callable, parallel: ParallelConfig) -> None:
    """A convolution that reaches back to nothing, groups that tp does not divide, segments of one token."""
    case = Case(model=BARE, parallel=parallel, rows=ROWS)
    for errors in gloo(parallel.cp * parallel.tp, largest_errors, [case], [one_process(BARE, ROWS)]):
        assert max(errors[0].values()) <= 1e-9, errors


STEPS = [
    (1, ParallelConfig(), 8, "none"),
    (2, ParallelConfig(), 4, "none"),
    (4, ParallelConfig(reshard_after_forward=False), 1, "none"),
    (4, ParallelConfig(dp_replicate=2), 1, "selective"),
    (1, ParallelConfig(), 3, "full"),
    (2, ParallelConfig(), 3, "selective"),
    (2, ParallelConfig(tp=2), 3, "full"),
    (2, ParallelConfig(cp=2, cp_layout="zigzag"), 3, "full"),
    (2, ParallelConfig(cp=2, cp_attention="ring", repeat_exchange=True), 8, "full"),
    (4, ParallelConfig(cp=2, tp=2), 8, "selective"),
]


@pytest.mark.parametrize(("world_size", "parallel", "micro_rows", "recompute"), STEPS)
def test_one_step_equals_one_process(
    gloo: Callable, world_size: int, parallel: ParallelConfig, micro_rows: int, recompute: Recompute
) -> None:
    """Uneven micro-batches and recomputation change nothing, alone and under layouts."""
    case = Case(model=model_config(), parallel=parallel, rows=ROWS, micro_rows=micro_rows, recompute=recompute)
    expected = one_process(model_config(), ROWS)
    for errors in gloo(world_size, largest_errors, [case], [expected]):
        assert max(errors[0].values()) <= 1e-9, errors


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(cp=2), ParallelConfig(cp=2, cp_layout="zigzag"), ParallelConfig(tp=2)]
)
def test_recomputation_gives_the_same_bits(gloo: Callable, parallel: ParallelConfig) -> None:
    ways: tuple[Recompute, ...] = ("none", "full", "selective")
    plain, *others = (gloo(2, spread_step, model_config(), parallel, ROWS, how) for how in ways)
    for other in others:
        for (loss, gradients), (known_loss, known) in zip(other, plain, strict=True):
            assert loss == known_loss
            assert [name for name in known if not torch.equal(gradients[name], known[name])] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=2),
        ParallelConfig(cp=2, cp_layout="zigzag", cp_attention="ring"),
        ParallelConfig(pp=2),
    ],
)
def test_compiled_blocks_compute_the_same(gloo: Callable, parallel: ParallelConfig) -> None:
    case = Case(model=model_config(), parallel=parallel, rows=ROWS, micro_rows=4, compile=True)
    for errors in gloo(2, largest_errors, [case], [one_process(model_config(), ROWS)], timeout_s=200):
        assert max(errors[0].values()) <= 1e-9, errors


def first_values(config: ParallelConfig) -> dict[str, torch.Tensor]:
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))
    with torch.device("meta"):
        model = HybridLM(model_config())
    spread_model(model, build_mesh(config, world), config)
    materialise(model, world.device, 7)
    return {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("world_size", "config"),
    [(2, ParallelConfig()), (4, ParallelConfig(dp_replicate=2)), (3, ParallelConfig(tp=3)), (2, ParallelConfig(cp=2))],
)
def test_first_values_do_not_depend_on_the_layout(gloo: Callable, world_size: int, config: ParallelConfig) -> None:
    model = HybridLM(model_config())
    model.initialize(7)
    for values in gloo(world_size, first_values, config):
        assert all(torch.equal(values[name], p) for name, p in model.named_parameters())


def recomputed_products(recompute: Recompute) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    model = HybridLM(model_config()).double()
    model.initialize(7)
    recompute_blocks(model, recompute)
    tokens, targets, reset = batch()
    loss_sum, _ = model(tokens, SequenceContext(reset_BL=reset), targets)
    with FlopCounterMode(display=False) as counter:
        loss_sum.backward()
    return counter.get_total_flops()


def test_selective_recomputation_repeats_no_matrix_product() -> None:
    assert recomputed_products("selective") == recomputed_products("none") < recomputed_products("full")


def mixed_precision_dtypes() -> dict[str, set[str]]:
    """The dtypes that FSDP and the model really use under bfloat16."""
    config, world = ParallelConfig(), this_world()
    with torch.device("meta"):
        model = HybridLM(model_config())
    spread_model(model, build_mesh(config, world), config, compute_dtype=torch.bfloat16)
    materialise(model, world.device, 7)
    seen: dict[str, set[str]] = {"residual": set(), "matrix": set(), "ssm": set()}
    kinds = model.parameter_kinds()
    for index, block in model.layers.items():
        block.register_forward_hook(lambda module, inputs, output: seen["residual"].add(str(output[0].dtype)))
        for name, module in block.named_modules():
            prefix = f"layers.{index}.{name}." if name else f"layers.{index}."

            def note(module: torch.nn.Module, inputs: tuple, prefix: str = prefix) -> None:
                for own, parameter in module.named_parameters(recurse=False):
                    if kinds[prefix + own] in seen:
                        seen[kinds[prefix + own]].add(str(parameter.dtype))

            module.register_forward_pre_hook(note)
    tokens, targets, reset = batch()
    loss_sum, count = model(tokens, SequenceContext(reset_BL=reset), targets)
    (loss_sum / count).backward()
    seen["gradient"] = {str(p.grad.dtype) for p in model.parameters() if p.grad is not None}
    return seen


def test_mixed_precision_keeps_what_must_stay_float32(gloo: Callable) -> None:
    for seen in gloo(2, mixed_precision_dtypes):
        assert seen == {
            "residual": {"torch.float32"},
            "matrix": {"torch.bfloat16"},
            "ssm": {"torch.float32"},
            "gradient": {"torch.float32"},
        }
