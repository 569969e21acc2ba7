"""Parity is the proof: one float64 training step under every layout gives one process's loss and every gradient.

Layouts x patterns x rows; the largest relative error of each layout and pattern goes to docs/parity.md when
`HEADRACE_WRITE_DOCS=1` is set.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.mixers.attention import AttentionConfig, SlidingAttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.parallel.config import ParallelConfig
from spread import Case, Rows, Step, largest_errors, one_process

LIMIT = 1e-9
PAGE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"


def model(pattern: str, *, groups: int, tied: bool, **mamba2: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        d_model=16,
        pattern=pattern,
        tie_embeddings=tied,
        mamba2=replace(Mamba2Config(head_dim=4, d_state=5, num_groups=groups, num_heads=4, chunk_size=8), **mamba2),
        mamba1=Mamba1Config(d_state=3, dt_rank=5, inner_norms=True, bias=True),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, rope_fraction=1.0, bias=True),
        sliding_attention=SlidingAttentionConfig(num_heads=4, num_kv_heads=1, rope_fraction=0.5, window=7),
        mlp=MLPConfig(d_hidden=12, bias=True),
        moe=MoEConfig(num_experts=8, top_k=3, d_hidden=8, renormalize=True, d_shared=8, balance_loss=0.1, z_loss=0.01),
    )


PATTERNS = {
    "Mamba-2, G=1, tied": model("4*mamba2", groups=1, tied=True),
    "Mamba-2, G=4": model("4*mamba2", groups=4, tied=False, skip="channel", bias=True),
    "hybrid, G=2, tied": model("mamba2 attention mamba2 mlp", groups=2, tied=True),
    "sliding window, G=2": model("sliding_attention mamba2 mlp sliding_attention", groups=2, tied=False),
    "Mamba-1": model("mamba1 mlp mamba1 mamba1", groups=1, tied=False),
    "MoE": model("mamba2 moe mamba1 moe", groups=2, tied=True),
}
# 29 divides nothing. With 2, 4 or 8 segments edges lie at 15; 8, 15, 22; 4, 8, 12, 16, 20, 23, 26: documents begin
# on them, one token before and one after, and inside segments.
PACKED = Rows(4, 29, (0, 3, 7, 8, 9, 14, 15, 16, 21, 27))
DEGREES: tuple[dict[str, object], ...] = (
    *({axis: size} for size in (2, 4) for axis in ("tp", "cp", "pp", "dp_shard", "dp_replicate")),
    *(
        {"cp": cp, "cp_layout": layout, "cp_exchange": exchange}
        for cp in (2, 4)
        for layout in ("contiguous", "zigzag")
        for exchange in ("chain", "doubling", "gather")
    ),
    *({"cp": 4, "cp_layout": layout, "cp_attention": "ring"} for layout in ("contiguous", "zigzag")),
    {"cp": 3, "cp_virtual": 2, "cp_layout": "zigzag"},
    {"cp": 1, "cp_virtual": 4},
    {"pp": 2, "pp_stages": 2, "pp_schedule": "interleaved"},
    {"pp": 2, "pp_stages": 2, "pp_schedule": "zero_bubble"},
    {"tp": 2, "cp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp_shard": 2},
    {"tp": 2, "dp_replicate": 2},
    {"cp": 2, "pp": 2, "cp_layout": "zigzag"},
    {"cp": 2, "dp_shard": 2, "cp_layout": "zigzag"},
    {"cp": 2, "dp_replicate": 2},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "dp_replicate": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 2, "cp": 2, "pp": 2},
    {"tp": 2, "cp": 2, "dp_shard": 2, "cp_layout": "zigzag", "cp_attention": "ring"},
    {"tp": 2, "pp": 2, "dp_shard": 2},
    {"cp": 2, "pp": 2, "dp_replicate": 2, "cp_layout": "zigzag"},
    {"tp": 2, "cp": 2, "pp": 2, "dp_shard": 2, "cp_layout": "zigzag", "cp_exchange": "doubling"},
)
# Of experts: with these only the pattern that has some.
EXPERT_DEGREES: tuple[dict[str, object], ...] = (
    {"dp_shard": 2, "ep": 2},
    {"dp_shard": 4, "ep": 4},
    {"cp": 2, "ep": 2},
    {"cp": 4, "cp_layout": "zigzag", "ep": 4},
    {"tp": 2, "dp_shard": 2, "ep": 2},
    {"tp": 2, "cp": 2, "ep": 4, "ep_over_tp": True},
    {"pp": 2, "dp_shard": 2, "ep": 2},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    {"tp": 2, "cp": 2, "pp": 2, "dp_shard": 2, "cp_layout": "zigzag", "ep": 4},
)
LAYOUTS = (*DEGREES, *EXPERT_DEGREES)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def name_of(degrees: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in degrees.items())


def rows_of(pattern: str) -> list[Rows]:
    """Packed rows, the last of them one document; and for one pattern only such."""
    return [PACKED, Rows(4, 29)] if pattern.startswith("hybrid") else [PACKED]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Step]]:
    """One process's steps by pattern, one for each kind of rows."""
    return {name: [one_process(config, rows) for rows in rows_of(name)] for name, config in PATTERNS.items()}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, float]]]:
    """The largest errors by layout and pattern; written when the module is done."""
    found: dict[str, dict[str, float]] = {}
    yield found
    if os.environ.get("HEADRACE_WRITE_DOCS") == "1" and len(found) == len(LAYOUTS):
        PAGE.write_text(format_table(found))


def format_table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "# Parity",
        "",
        "One training step in float64: the largest relative error of the loss and of every gradient against one",
        "process without any parallelism, over packed rows and rows of one document. Written by",
        "`HEADRACE_WRITE_DOCS=1 pytest tests/test_same_function.py`, which fails above 1e-9.",
        "",
        f"| layout | ranks | {' | '.join(PATTERNS)} |",
        f"| --- | ---: |{' ---: |' * len(PATTERNS)}",
    ]
    for degrees in LAYOUTS:
        by_pattern = found[name_of(degrees)]
        errors = " | ".join(f"{by_pattern[name]:.0e}" if name in by_pattern else "–" for name in PATTERNS)
        lines.append(f"| {name_of(degrees)} | {ranks_of(degrees)} | {errors} |")
    return "\n".join(lines) + "\n"


def ranks_of(degrees: dict[str, object]) -> int:
    return prod(int(str(degrees.get(axis, 1))) for axis in AXES)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=name_of)
def test_one_step_equals_one_process(
    gloo: Callable, expected: dict[str, list[Step]], table: dict[str, dict[str, float]], degrees: dict[str, object]
) -> None:
    parallel = ParallelConfig(**{"dp_shard": 1, **degrees})  # type: ignore[arg-type]
    names, cases, steps = [], [], []
    for name, config in PATTERNS.items():
        if parallel.ep > 1 and "moe" not in config.kinds:
            continue
        for rows, step in zip(rows_of(name), expected[name], strict=True):
            names.append(name)
            cases.append(Case(model=config, parallel=parallel, rows=rows, micro_rows=1 if parallel.pp > 1 else 0))
            steps.append(step)
    by_rank = gloo(ranks_of(degrees), largest_errors, cases, steps, timeout_s=120)
    largest: dict[str, float] = {}
    for name, case, step, errors in zip(names, cases, steps, zip(*by_rank, strict=True), strict=True):
        assert set().union(*errors) == {"loss", *step[1]}, f"{case}: gradients are missing"
        worst = max((error, parameter) for part in errors for parameter, error in part.items())
        assert worst[0] <= LIMIT, f"{case}: {worst[1]} is off by {worst[0]:.1e}"
        largest[name] = max(worst[0], largest.get(name, 0.0))
    table[name_of(degrees)] = largest


def test_the_published_table_is_of_this_matrix() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| [a-z_]+=", line)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [name_of(degrees) for degrees in LAYOUTS]
    errors = [error for row in rows for error in row.strip("| ").split(" | ")[2:] if error != "–"]
    assert all(float(error) <= LIMIT for error in errors)
