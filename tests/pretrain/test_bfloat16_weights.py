"""Weights kept in bfloat16: what stays float32, stochastic rounding, resuming, other layouts, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace.errors import UserError
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.run import checkpoints
from headrace.pretrain.saved_run import load_run
from tiny import losses, tiny_config, train_or_refusal

NARROW = (
    "train.weights=bfloat16",
    "train.precision=bfloat16",
    "optimizer.kind=adamw",
    "optimizer.state_bits=8",
    "optimizer.block_size=16",
    "optimizer.min_8bit_size=0",
    "optimizer.stochastic_rounding=true",
    "train.steps=40",
)


def last(config: Config) -> dict[str, torch.Tensor]:
    return load_full(latest_checkpoint(checkpoints(config)))


def test_learns_resumes_and_reshards(gloo: Callable, tmp_path: Path, data: Path) -> None:
    whole, cut = (tiny_config(tmp_path, data, *NARROW, f"run.name={name}") for name in ("whole", "cut"))
    assert gloo(1, train_or_refusal, whole, 40) == [40]
    assert gloo(1, train_or_refusal, cut, 20) == [20]
    assert gloo(1, train_or_refusal, cut, 40) == [40]
    assert losses(whole) == losses(cut)
    tensors = last(whole)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors.values(), last(cut).values(), strict=True))
    dtypes = {name.removeprefix("model."): t.dtype for name, t in tensors.items() if name.startswith("model.")}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "layers.0.mixer.ssm.A_log",
        "layers.0.mixer.ssm.D",
        "layers.0.mixer.ssm.dt_bias",
    }
    copies = {name.removeprefix("optim.master.") for name in tensors if name.startswith("optim.master.")}
    assert "embed.weight" in copies
    assert "layers.0.norm.weight" in copies
    assert "layers.0.mixer.in_x.weight" not in copies

    wide = tiny_config(tmp_path, data, "optimizer.kind=adamw", "train.steps=40", "run.name=wide")
    assert gloo(1, train_or_refusal, wide, 40) == [40]
    assert sum(losses(whole)[-5:]) == pytest.approx(sum(losses(wide)[-5:]), rel=0.02)
    spread = tiny_config(tmp_path, data, *NARROW, "parallel.tp=2", "run.name=spread")
    assert gloo(4, train_or_refusal, spread, 40, timeout_s=120) == [40] * 4
    assert sum(losses(spread)[-5:]) == pytest.approx(sum(losses(whole)[-5:]), rel=0.02)
    model, _, _ = load_run(whole.run.folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_without_chance_small_updates_are_lost(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """What stochastic rounding is for: at a small learning rate few weights would move at all."""
    moved = {}
    for chance in ("true", "false"):
        names = (f"optimizer.stochastic_rounding={chance}", f"run.name=chance-{chance}", "optimizer.lr=1e-5")
        config = tiny_config(tmp_path, data, *NARROW, *names, "optimizer.weight_decay=0")
        assert gloo(1, train_or_refusal, config, 10) == [10]
        at = [load_full(checkpoints(config) / f"step-{step:08}") for step in (2, 10)]
        name = "model.layers.1.mixer.up_proj.weight"
        moved[chance] = float((at[0][name] != at[1][name]).float().mean())
    assert moved["true"] > 5 * moved["false"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.weights=bfloat16",), "train.weights=bfloat16 loses muon's small updates"),
        (("train.weights=bfloat16", "train.precision=float32"), "does not go with train.precision=float32"),
        (("optimizer.stochastic_rounding=true",), "is for bfloat16 weights with 8-bit moments"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, data: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, data, *overrides)


def test_on_cpus_precision_must_be_said(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "train.weights=bfloat16", "optimizer.kind=adamw")
    (refused,) = gloo(1, train_or_refusal, config, 2)
    assert "on cpu precision is float32; set train.precision=bfloat16" in refused
