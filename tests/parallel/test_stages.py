"""Cutting layers into stages, and which numbers of micro-batches can be scheduled over them."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.parallel.config import ParallelConfig
from headrace.parallel.stages import cut_stages, pipeline_problems, stages_of_rank


def model_config(pattern: str, vocab: int = 64) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        d_model=16,
        pattern=pattern,
        mamba2=Mamba2Config(head_dim=8, d_state=4),
        attention=AttentionConfig(num_heads=2),
        mlp=MLPConfig(d_hidden=40),
    )


def costs_of(config: ModelConfig, seq_len: int, stages: list[range]) -> list[int]:
    costs = [layer.flops_per_token(config.d_model, seq_len) for layer in config.layers]
    costs[-1] += 6 * config.vocab_size * config.d_model
    return [sum(costs[i] for i in stage) for stage in stages]


@given(
    st.lists(st.sampled_from(["mamba2", "attention", "mlp"]), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from([1, 64, 4096]),
    st.sampled_from([2, 64, 3000]),
)
def test_no_cut_is_better(kinds: list[str], num_stages: int, seq_len: int, vocab: int) -> None:
    num_stages = min(num_stages, len(kinds))
    config = model_config(" ".join(kinds), vocab)
    stages = cut_stages(config, num_stages, seq_len)
    assert [i for stage in stages for i in stage] == list(range(len(kinds)))
    assert len(stages) == num_stages
    assert all(len(stage) >= 1 for stage in stages)
    every_cut = [
        sorted(costs_of(config, seq_len, [range(a, b) for a, b in pairwise((0, *cuts, len(kinds)))]), reverse=True)
        for cuts in combinations(range(1, len(kinds)), num_stages - 1)
    ]
    assert sorted(costs_of(config, seq_len, stages), reverse=True) == min(every_cut)
    assert stages == cut_stages(config, num_stages, seq_len)


def test_equal_layers_are_dealt_out_evenly_and_the_first_of_equal_stages_is_the_lighter() -> None:
    stages = cut_stages(model_config("10*mlp", vocab=1), 4, 64)  # the head weighs a little
    assert [len(stage) for stage in stages] == [2, 3, 3, 2]


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    assert [len(stage) for stage in cut_stages(model_config("8*mlp", vocab=1000), 2, 64)] == [7, 1]


def test_deep_models_are_cut_in_no_time() -> None:
    stages = cut_stages(model_config("128*(mamba2 mlp)"), 32, 4096)
    assert [stage.start for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 pipeline stages .* 2"):
        cut_stages(model_config("2*mlp"), 3, 64)


def test_stages_go_round_the_ranks() -> None:
    config = ParallelConfig(pp=2, pp_stages=3, pp_schedule="interleaved")
    assert [stages_of_rank(config, rank) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]


def test_micro_batches_that_a_schedule_cannot_run_are_named_with_sizes_that_it_can() -> None:
    plain = ParallelConfig(pp=4)
    assert pipeline_problems(plain, 8, 2) == []
    (line,) = pipeline_problems(plain, 8, 3)
    assert "micro_batch_rows=3 cuts the 8 rows of each data rank into 3 micro-batches" in line
    assert "use train.micro_batch_rows in {1, 2}" in line
    (line,) = pipeline_problems(plain, 3, 1)
    assert "raise train.batch_rows" in line
    looped = ParallelConfig(pp=4, pp_stages=2, pp_schedule="interleaved")
    assert [count for count in range(1, 17) if not pipeline_problems(looped, count, 1)] == [
        *range(1, 9),
        10,
        12,
        15,
        16,
    ]
    assert pipeline_problems(ParallelConfig(), 5, 3) == []


def test_a_backward_pass_in_halves_goes_with_neither_recomputation_nor_compilation() -> None:
    config = ParallelConfig(pp=2, pp_stages=2, pp_schedule="zero_bubble")
    assert pipeline_problems(config, 4, 1) == []
    for options in ({"recompute": "full"}, {"recompute": "selective"}, {"compiled": True}):
        (line,) = pipeline_problems(config, 4, 1, **options)  # type: ignore[arg-type]
        assert "pp_schedule=interleaved" in line
        assert pipeline_problems(ParallelConfig(pp=2), 4, 1, **options) == []  # type: ignore[arg-type]
