"""A run saved under one layout goes on under any other: the same bits loaded, the same next loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from headrace.parallel.mesh import build_mesh
from headrace.pretrain.build import build_engine
from headrace.pretrain.checkpoint import latest_checkpoint, load_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.optimizers.build import build_optimizers
from headrace.pretrain.resume import training_tensors
from headrace.pretrain.run import checkpoints
from tiny import this_world, tiny_config, train_tiny

LAYOUTS = {
    "one": (1, {}),
    "pp2": (2, {"pp": 2}),
    "tp4": (4, {"tp": 4}),
    "cp3-dp2": (6, {"cp": 3}),
    "tp2-dp3": (6, {"tp": 2}),
    "tp2-cp2-dp2": (8, {"tp": 2, "cp": 2, "cp_layout": "zigzag"}),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2, "dp_replicate": 2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2-dp2-ep2": (4, {"tp": 2, "ep": 2}),
    "tp2-cp2-ep4": (4, {"tp": 2, "cp": 2, "ep": 4, "ep_over_tp": "true"}),
    "pp2-dp3-ep3": (6, {"pp": 2, "ep": 3}),
    "cp4-dp2": (8, {"cp": 4}),  # more ranks than experts: cut along another dimension
}
EXPERTS = (
    'model.pattern="mamba2 moe mamba2 moe"',
    "model.moe.num_experts=12",
    'model.moe.score="sigmoid"',
    'model.moe.balance="bias"',
    "model.moe.bias_rate=0.01",
    "eval.every_steps=4",
    "eval.window=32",
    "eval.max_tokens=300",
)
BASE = ("model.attention.num_heads=4", "train.batch_rows=6", "train.micro_batch_rows=1", "checkpoint.every_steps=3")


def config_for(folder: Path, data: Path, layout: str | dict[str, object], kind: str, *more: str) -> Config:
    degrees = {**LAYOUTS, **EXPERT_LAYOUTS}[layout][1] if isinstance(layout, str) else layout
    values = (f"parallel.{key}={value}" for key, value in degrees.items())
    return tiny_config(folder, data, *BASE, f"optimizer.kind={kind}", *values, *more)


def load_and_compare(config: Config, path: str) -> list[str]:
    """Tensors of the run that, loaded under this layout and put together again, are not what the checkpoint holds."""
    world = this_world()
    engine = build_engine(config, build_mesh(config.parallel, world), world)
    tensors = training_tensors(engine.named_parameters(), build_optimizers(engine.models, config.optimizer))
    load_checkpoint(path, tensors)
    saved = load_full(path, tensors)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return [name for name, tensor in whole.items() if not torch.equal(tensor, saved[name])]


def records(config: Config, kind: str, key: str) -> dict[int, float]:
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if line["kind"] == kind}


def losses(config: Config) -> dict[int, float]:
    return records(config, "train", "loss")


@pytest.mark.parametrize(
    ("saved_as", "kind", "layouts"),
    [
        ("tp2-cp2-dp2", "adamw", tuple(LAYOUTS)),
        ("tp2-pp2-dp2", "muon", ("one", "tp4", "cp3-dp2")),
    ],
    ids=["adamw", "muon"],
)
def test_a_checkpoint_goes_on_under_any_layout(
    gloo: Callable, tmp_path: Path, data: Path, saved_as: str, kind: str, layouts: tuple[str, ...]
) -> None:
    config = config_for(tmp_path, data, saved_as, kind)
    gloo(LAYOUTS[saved_as][0], train_tiny, config, 3, timeout_s=180)
    path = latest_checkpoint(checkpoints(config))
    gloo(LAYOUTS[saved_as][0], train_tiny, config, 6, timeout_s=180)
    expected = losses(config)
    for layout in layouts:
        other = config_for(tmp_path, data, layout, kind, f"run.name={layout}")
        ranks = LAYOUTS[layout][0]
        assert gloo(ranks, load_and_compare, other, str(path)) == [[]] * ranks, layout
        if layout not in ("one", "pp2", "tp4", "cp3-dp2"):
            continue
        checkpoints(other).mkdir(parents=True)
        (checkpoints(other) / path.name).symlink_to(path)
        gloo(ranks, train_tiny, other, 4)
        assert losses(other)[4] == pytest.approx(expected[4], rel=2e-6), layout


EIGHT_BITS = ("optimizer.state_bits=8", "optimizer.block_size=16", "optimizer.min_8bit_size=0")
GO_ON = {"dp4": (4, {}), "tp4": LAYOUTS["tp4"], "pp2-dp2": (4, {"pp": 2}), "one": LAYOUTS["one"]}


def test_fifty_steps_of_8_bit_states_under_another_layout(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Codes and scales bit for bit, then 50 losses equal to rounding."""
    more = (
        *EIGHT_BITS,
        'model.pattern="mamba2 mlp"',
        "train.steps=54",
        "train.batch_rows=4",
        "checkpoint.every_steps=0",
        "train.micro_batch_rows=2",
    )
    config = config_for(tmp_path, data, {"tp": 2}, "adamw", *more)
    gloo(4, train_tiny, config, 4)
    path = latest_checkpoint(checkpoints(config))
    gloo(4, train_tiny, config, 54, timeout_s=180)
    expected = losses(config)
    for layout, (ranks, degrees) in GO_ON.items():
        rows = f"train.micro_batch_rows={1 if 'pp' in degrees else 4}"
        other = config_for(tmp_path, data, degrees, "adamw", *more, f"run.name={layout}", rows)
        assert gloo(ranks, load_and_compare, other, str(path)) == [[]] * ranks, layout
        checkpoints(other).mkdir(parents=True)
        (checkpoints(other) / path.name).symlink_to(path)
        gloo(ranks, train_tiny, other, 54, timeout_s=180)
        found = losses(other)
        worst = max(abs(found[step] / expected[step] - 1) for step in range(5, 55))
        assert worst < 2e-6, layout


def test_experts_go_on_under_any_layout(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Weights, state and balance biases bit for bit; then the same loss, and every token to the same expert."""
    saved_as, kind = "tp2-dp2-ep2", "muon"
    config = config_for(tmp_path, data, saved_as, kind, *EXPERTS)
    ranks = EXPERT_LAYOUTS[saved_as][0]
    gloo(ranks, train_tiny, config, 3, timeout_s=180)
    path = latest_checkpoint(checkpoints(config))
    gloo(ranks, train_tiny, config, 5, timeout_s=180)
    loads = records(config, "routing", "load")
    assert any(value for layer in records(config, "routing", "bias")[5] for value in layer)
    for layout, (ranks, _) in EXPERT_LAYOUTS.items():
        other = config_for(tmp_path, data, layout, kind, *EXPERTS, f"run.name={layout}")
        assert gloo(ranks, load_and_compare, other, str(path)) == [[]] * ranks, layout
        checkpoints(other).mkdir(parents=True)
        (checkpoints(other) / path.name).symlink_to(path)
        gloo(ranks, train_tiny, other, 5, timeout_s=120)
        assert losses(other)[4] == pytest.approx(losses(config)[4], rel=2e-6), layout
        assert records(other, "routing", "load")[4] == loads[4], layout
        mine, theirs = (records(run, "eval", "bits_per_byte")[4] for run in (other, config))
        assert mine == pytest.approx(theirs, rel=2e-6), layout


EVALUATION = ("eval.every_steps=2", "eval.window=32", "eval.max_keys=20", "eval.max_tokens=300", "train.steps=4")
IN_BFLOAT16 = ("tp2-cp2-dp2", "tp2-pp2-dp2")  # as far as its digits go


@pytest.fixture(scope="module")
def alone(gloo: Callable, tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Config]:
    """Finished runs of one process, by precision."""
    found = {}
    for precision in ("float32", "bfloat16"):
        names = (f"run.name=one-{precision}", f"train.precision={precision}")
        found[precision] = config_for(tmp_path_factory.mktemp("alone"), data, "one", "muon", *EVALUATION, *names)
        gloo(1, train_tiny, found[precision], 4)
    return found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_training_and_evaluation_agree(
    gloo: Callable, tmp_path: Path, data: Path, alone: dict[str, Config], layout: str
) -> None:
    """Losses, gradient norms and held-out figures from the first step on."""
    for precision, limit in (("float32", 1e-5), ("bfloat16", 2e-2)):
        if precision == "bfloat16" and layout not in IN_BFLOAT16:
            continue
        names = (f"run.name={precision}", f"train.precision={precision}")
        config = config_for(tmp_path, data, layout, "muon", *EVALUATION, *names)
        gloo(LAYOUTS[layout][0], train_tiny, config, 4, timeout_s=120)
        for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "bits_per_byte")):
            expected, found = (records(run, kind, key) for run in (alone[precision], config))
            assert len(expected) == (4 if kind == "train" else 2)
            assert found == pytest.approx(expected, rel=limit), (precision, kind, key)
