"""Configurations: read, checked as a whole, written back."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.launch.cli import main
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.config_io import apply_overrides, format_toml
from tiny import CONFIG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def refusal(path: Path, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size)
    return str(caught.value)


def test_round_trip_through_toml(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optimizer.betas=[0.8, 0.99]", "parallel.dp_shard=2", 'data.folder=a "b"\\c\t'])
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configs_load(path: Path) -> None:
    assert isinstance(load_config(path), Config)


values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=("Cs",))),
    st.lists(st.integers(-5, 5)).map(tuple),
)
keys = st.text("abcdefgh_-0123", min_size=1)


@given(st.recursive(st.dictionaries(keys, values), lambda inner: st.dictionaries(keys, inner | values), max_leaves=8))
def test_written_toml_reads_back(tables: dict) -> None:
    def as_lists(value: object) -> object:
        if isinstance(value, dict):
            return {k: as_lists(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    assert tomllib.loads(format_toml(tables)) == as_lists(tables)


def test_unknown_key_names_the_nearest(path: Path) -> None:
    assert "unknown key model.d_modle; did you mean d_model?" in refusal(path, "model.d_modle=64")
    assert "unknown key trian; did you mean train?" in refusal(path, "trian.steps=3")


def test_all_mistakes_are_listed_at_once(path: Path) -> None:
    message = refusal(path, "train.steps=0", "optimizer.lr=-1", "model.pattern=mamba3", "log.every_steps=0")
    assert "mistakes" in message
    for part in ("train.steps=0", "optimizer.lr=-1", "mamba2", "log.every_steps=0"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=many", "train.steps='many' is not of type int"),
        ("train.steps=1.5", "train.steps=1.5 is not of type int"),
        ("train.compile=1", "train.compile=1 is not of type bool"),
        ("train.clip_norm=nan", "train.clip_norm=nan is not a number"),
        ("optimizer.lr=inf", "optimizer.lr=inf must be positive and finite"),
        ("optimizer.eps=0", "optimizer.eps=0.0 must be positive"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must be finite and not negative"),
        ("optimizer.muon.lr=0", "optimizer.muon.lr=0.0 must be positive and finite"),
        ("train.steps=true", "train.steps=True is not of type int"),
        ("optimizer.embedding_bits=8", "optimizer.embedding_bits=8 goes with optimizer.state_bits=8"),
        ("optimizer.block_size=8", "optimizer.block_size=8 must be between 16 and 4096"),
        ("train.average_decay=1", "train.average_decay=1.0 must be at least 0 and below 1"),
        ("optimizer.kind=sgd", "optimizer.kind='sgd' is not one of 'adamw', 'muon', 'low_rank'"),
        ("optimizer.betas=[0.9]", "optimizer.betas has 1 items; it needs 2"),
        ("model=3", "model=3 is not a table"),
        ("run.name=../up", "run.name='../up' must be letters"),
        ("train.steps", "has no value"),
        ("train.steps.x=1", "steps is a value, not a section"),
    ],
)
def test_wrong_values_say_what_is_wrong(path: Path, override: str, part: str) -> None:
    assert part in refusal(path, override)


def test_one_mistake_is_named_once(path: Path) -> None:
    assert refusal(path, "train.steps=0") == f"{path}: train.steps=0 must be at least 1"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[run\nname = 3")
    assert "not valid TOML" in refusal(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    assert "missing key run.name" in refusal(tmp_path / "empty.toml")


def test_layout_must_fit_the_world(path: Path) -> None:
    assert "batch_rows=4 does not split over 3 data-parallel ranks; use 3 or 6" in refusal(path, world_size=3)
    assert "dp_replicate=3 makes 3, which does not divide the 4 processes; start a multiple" in refusal(
        path, "parallel.dp_replicate=3", world_size=4
    )
    assert "parallel: dp_shard=3 needs 3 processes, but 4 were started" in refusal(
        path, "parallel.dp_shard=3", world_size=4
    )
    assert "needs 8 processes, but 4 were started" in refusal(
        path, "parallel.dp_replicate=2", "parallel.dp_shard=4", world_size=4
    )
    assert "train.micro_batch_rows=4 cuts the 4 rows of each data rank into 1 micro-batches, fewer than" in refusal(
        path, "parallel.pp=2", world_size=2
    )


def test_all_misfits_of_layout_and_model_come_at_once(path: Path) -> None:
    message = refusal(
        path,
        "parallel.tp=5",
        "parallel.pp=3",
        "parallel.cp=40",
        "model.pattern=mamba2 mlp",
        "model.vocab_size=321",
        "data.seq_len=32",
        world_size=7,
    )
    for part in (
        "pp=3 x cp=40 x tp=5 makes 600, which does not divide the 7 processes",
        "parallel.tp=5 does not divide model.mamba2.num_heads=",
        "parallel.tp=5 does not divide model.mlp.d_hidden=",
        "parallel.tp=5 does not divide model.vocab_size=",
        "makes 3 stages, but model.pattern has only 2 layers",
        "cuts a row into 40 segments, more than data.seq_len=32 tokens",
    ):
        assert part in message
    assert "parallel.tp=5 does not divide model.mamba1.expand*d_model=" in refusal(
        path, "parallel.tp=5", "model.pattern=mamba1", world_size=5
    )
    assert "train.recompute=full" in refusal(
        path,
        "parallel.pp=2",
        "parallel.pp_stages=2",
        'parallel.pp_schedule="zero_bubble"',
        "train.recompute=full",
        "train.micro_batch_rows=1",
        "model.pattern=4*mlp",
        world_size=2,
    )


EXPERTS = ("model.pattern=mamba2 moe", "model.moe.num_experts=12")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ((*EXPERTS, "model.moe.top_k=13"), "moe.top_k=13 is above num_experts=12; lower it"),
        ((*EXPERTS, "model.moe.num_groups=5"), "moe.num_groups=5 does not divide num_experts=12; use one of 1, 2, 3"),
        ((*EXPERTS, "model.moe.num_groups=4", "model.moe.top_groups=5"), "moe.top_groups=5 is above num_groups=4"),
        (
            (*EXPERTS, "model.moe.num_groups=4", "model.moe.top_k=4"),
            "moe.top_k=4 is above the 3 experts of top_groups=1; lower it",
        ),
        ((*EXPERTS, "model.moe.balance=even"), "model.moe.balance='even' is not one of 'loss', 'bias'"),
        ((*EXPERTS, "model.moe.jitter=1"), "moe.jitter=1.0 must lie between 0 and 1; use 0 for none"),
        ((*EXPERTS, "model.moe.z_loss=-1"), "moe.z_loss=-1.0 must not be negative"),
        ((*EXPERTS, "model.moe.num_experts=0"), "moe.num_experts=0 must be at least 1"),
        (
            (*EXPERTS, "model.moe.num_experts=6", "parallel.ep=4"),
            "parallel.ep=4 does not divide model.moe.num_experts=6; use one of 1, 2, 3, 6",
        ),
        (("parallel.ep=2",), "parallel.ep=2 shares out experts, but model.pattern has no moe layers; set ep=1"),
        (
            (*EXPERTS, "parallel.ep=3"),
            "parallel.ep=3 does not divide the dp_shard=4 x cp=1 ranks that hold different tokens; use one of 1, 2, 4",
        ),
        ((*EXPERTS, "parallel.ep=4", "parallel.tp=2"), "does not divide the dp_shard=2 x cp=1 ranks"),
        (
            (*EXPERTS, "model.moe.num_experts=8", "parallel.ep=8", "parallel.tp=2", "parallel.ep_over_tp=true"),
            "does not divide the dp_shard=2 x cp=1 x tp=2 ranks",
        ),
        (
            (*EXPERTS, "parallel.tp=2", "model.moe.d_hidden=25"),
            "parallel.tp=2 does not divide model.moe.d_hidden=25; use tp in {1, 5, 25}, or d_hidden=26",
        ),
        ((*EXPERTS, "parallel.tp=2", "model.moe.d_shared=3"), "parallel.tp=2 does not divide model.moe.d_shared=3"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_experts_that_do_not_fit_are_one_line(
    path: Path, overrides: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(path), "--nproc", "4", *overrides]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


def test_overrides_do_not_need_quotes() -> None:
    assert apply_overrides({}, ["a.b=word", "a.c=1e-3", "d=[1, 2]", "e=true"]) == {
        "a": {"b": "word", "c": 1e-3},
        "d": [1, 2],
        "e": True,
    }


def test_configs_are_frozen(path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(path).train.steps = 3  # type: ignore[misc]
