"""Learning-rate schedules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.pretrain.schedule import ScheduleConfig


@given(
    st.builds(
        ScheduleConfig,
        kind=st.sampled_from(["cosine", "wsd"]),
        warmup_steps=st.integers(0, 49),
        decay_fraction=st.floats(0, 1),
        final_ratio=st.floats(0, 1),
    ),
    st.integers(50, 500),
)
def test_starts_low_never_leaves_the_unit_interval_and_ends_at_its_floor(config: ScheduleConfig, total: int) -> None:
    scales = [config.scale(step, total) for step in range(1, total + 1)]
    assert all(0.0 <= scale <= 1.0 for scale in scales)
    assert scales[-1] == pytest.approx(config.final_ratio)
    after = scales[config.warmup_steps :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def test_known_points() -> None:
    wsd = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2)
    assert [wsd.scale(s, 100) for s in (1, 10, 80, 90, 100)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])
    cosine = ScheduleConfig(kind="cosine", warmup_steps=20, final_ratio=0.1)
    assert [cosine.scale(s, 100) for s in (10, 20, 60, 100)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_out_of_range() -> None:
    config = ScheduleConfig(warmup_steps=11, decay_fraction=1.5, final_ratio=-1)
    assert len(config.problems(total_steps=10)) == 3
