"""The health of routing: what is counted, told once, and stops a run; and how the balance bias moves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.data import Batch
from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.ffns.routing import TOLD, move_bias
from headrace.model.lm import HybridLM
from headrace.model.sequence import SequenceContext, TrainingPass
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from headrace.pretrain.config import Config
from headrace.pretrain.engine import Engine
from headrace.pretrain.metrics import _scalars
from headrace.pretrain.routing import RoutingReport, RoutingTally
from headrace.pretrain.trainer import train
from tiny import this_world, tiny_config

CPU = torch.device("cpu")


def model_config(pattern: str = "mlp 2*moe", **moe: Any) -> ModelConfig:
    options = {"num_experts": 4, "top_k": 1, "d_hidden": 8, **moe}
    return ModelConfig(vocab_size=20, d_model=8, pattern=pattern, moe=MoEConfig(**options))


def told(*load: float, entropy: float = 0.0, nonfinite: float = 0.0) -> torch.Tensor:
    """What a router tells of a pass."""
    rest = {"entropy": entropy, "tokens": sum(load), "nonfinite": nonfinite}
    return torch.tensor([*load, *(rest[name] for name in TOLD)], dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def alone() -> Any:
    """A process group of one: the tally sums over all processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_passes_add_up_and_a_report_starts_anew() -> None:
    tally = RoutingTally(model_config(), CPU)
    for _ in range(2):
        tally.add({1: told(3, 1, 0, 0, entropy=2.0), 2: told(1, 1, 1, 1, entropy=4.0)})
        tally.finish_step([], torch.zeros(()))
    report = tally.report([])
    assert report is not None
    assert report.record() == {
        "layers": [1, 2],
        "load": [[0.75, 0.25, 0.0, 0.0], [0.25] * 4],
        "max_violation": [2.0, 0.0],
        "entropy": [0.5, 1.0],
        "bias": [[0.0] * 4] * 2,
        "dropped": 0,
    }
    assert report.warning() is None
    tally.add({1: told(0, 0, 0, 5), 2: told(0, 5, 0, 0)})
    tally.finish_step([], torch.zeros(()))
    again = tally.report([])
    assert again is not None
    assert [again.layers[1].load, again.layers[2].load] == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert [health.max_violation for health in again.layers.values()] == [3.0, 3.0]  # one of four has all


def warnings(tally: RoutingTally, loads: list[tuple[float, ...]]) -> list[str | None]:
    found = []
    for load in loads:
        tally.add({0: told(*load)})
        tally.finish_step([], torch.zeros(()))
        report = tally.report([])
        assert report is not None
        found.append(report.warning())
    return found


def test_the_dead_are_told_of_once_and_again_after_a_revival() -> None:
    silent, alive = (2, 2, 0, 4), (2, 2, 1, 3)
    tally = RoutingTally(model_config("moe"), CPU)
    found = warnings(tally, [silent] * 5 + [alive] + [silent] * 4)
    assert [line is not None for line in found] == [False, False, True, *[False] * 5, True, False]
    line = "no token has gone to these experts in 3 reports (layer 0: 2); raise model.moe.balance_loss"
    assert found[2] == found[8] == line
    several = RoutingReport({}, {0: [2], 4: [0, 3]}).warning()
    assert several is not None
    assert "(layer 0: 2, layer 4: 0, 3)" in several


def test_layers_whose_logits_are_not_finite_are_named() -> None:
    tally = RoutingTally(model_config("3*moe"), CPU)
    tally.add({0: told(1, 1, 1, 1), 1: told(1, 1, 1, 1, nonfinite=2), 2: told(1, 1, 1, 1, nonfinite=4)})
    tally.finish_step([], torch.zeros(()))
    with pytest.raises(
        UserError, match=r"the router of layer 1, 2 gave logits that are not finite; lower optimizer.lr"
    ):
        tally.report([])


def test_without_experts_there_is_nothing() -> None:
    tally = RoutingTally(model_config("mlp"), CPU)
    tally.finish_step([], torch.zeros(()))
    assert tally.report([]) is None


def test_the_bias_moves_against_the_load() -> None:
    """By hand, algorithm 1 of arXiv:2408.15664: mean load 5, so up, down, as it was, up."""
    bias = torch.tensor([0.5, 0.5, -0.25, 0.0])
    load = torch.tensor([4.0, 8.0, 5.0, 3.0], dtype=torch.float64)
    moved = move_bias(bias, load, 0.125, torch.tensor(0.0))
    assert moved.tolist() == [0.625, 0.375, -0.25, 0.125]
    assert torch.equal(move_bias(bias, load, 0.125, torch.tensor(1.0)), bias)


def initialised(config: ModelConfig) -> HybridLM:
    model = HybridLM(config)
    model.initialize(1)
    return model


def test_an_update_moves_the_biases_and_a_skipped_one_does_not() -> None:
    config = model_config("moe", balance="bias", score="sigmoid", bias_rate=0.5)
    model, tally = initialised(config), RoutingTally(config, CPU)
    for skip, expected in ((1.0, [0.0, 0.0, 0.0, 0.0]), (0.0, [-0.5, 0.5, 0.5, 0.5])):
        tally.add({0: told(9, 1, 0, 0)})
        tally.finish_step([model], torch.tensor(skip))
        assert model.layers["0"].mixer.router.balance_bias.tolist() == expected
    report = tally.report([model])
    assert report is not None
    assert report.layers[0].bias == [-0.5, 0.5, 0.5, 0.5]
    assert report.layers[0].load == [0.9, 0.1, 0.0, 0.0]  # skipped or not, they were routed


def test_all_tokens_to_one_expert() -> None:
    config = model_config("moe", balance="bias", score="sigmoid")
    model, tally = initialised(config), RoutingTally(config, CPU)
    with torch.no_grad():
        model.layers["0"].mixer.router.balance_bias[2] = 10.0
    tokens = torch.arange(12).view(2, 6)
    training = TrainingPass(torch.ones((), dtype=torch.float64), torch.arange(12).view(2, 6))
    loss, _ = model(tokens, SequenceContext(training=training), tokens)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    tally.add(training.told)
    tally.finish_step([model], torch.ones(()))
    report = tally.report([model])
    assert report is not None
    health = report.layers[0]
    assert (health.load, health.max_violation) == ([0, 0, 1, 0], 3.0)
    assert 0 < health.entropy <= math.log(4)


def test_nothing_is_told_without_training() -> None:
    model, tokens = initialised(model_config("moe")), torch.arange(12).view(2, 6)
    training = TrainingPass(torch.ones((), dtype=torch.float64), torch.arange(12).view(2, 6))
    losses = [model(tokens, SequenceContext(training=t), tokens)[0] for t in (None, training)]
    assert torch.equal(*losses)  # what is added to the gradient is not in the loss
    assert [*training.told] == [0]


def test_wandb_is_sent_one_number_a_layer() -> None:
    tally = RoutingTally(model_config(), CPU)
    tally.add({1: told(3, 1, 0, 0), 2: told(1, 1, 1, 1)})
    tally.finish_step([], torch.zeros(()))
    report = tally.report([])
    assert report is not None
    assert _scalars({"kind": "routing", "step": 7, **report.record()}) == {
        "routing/max_violation/layer_1": 2.0,
        "routing/max_violation/layer_2": 0.0,
        "routing/entropy/layer_1": 0.0,
        "routing/entropy/layer_2": 0.0,
        "routing/dropped": 0,
    }
    assert _scalars({"kind": "eval", "step": 7, "loss": 2.0}) == {"eval/loss": 2.0}


# Whole runs.

MOE = ("model.pattern=mamba2 moe", "model.moe.num_experts=4", "model.moe.d_hidden=16", "model.moe.balance=bias")


def run_poisoned(config: Config, name: str, bad_step: int) -> str | int:
    """Train; before one step a gradient (of a name that ends in `grad`) or a weight becomes NaN."""
    original, calls = Engine.forward_backward, 0

    def poisoned(engine: Engine, batch: Batch) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        parameter: Any = engine.named_parameters()[name.removesuffix(".grad")]
        bad = calls == bad_step
        if bad and not name.endswith(".grad"):
            parameter.detach().to_local().fill_(float("nan"))
        result = original(engine, batch)
        if bad and name.endswith(".grad"):
            parameter.grad.to_local().fill_(float("nan"))
        return result

    Engine.forward_backward = poisoned  # type: ignore[method-assign]
    try:
        return train(config, this_world()).step
    except UserError as error:
        return str(error) if error.everywhere else "every rank would print its own"
    finally:
        Engine.forward_backward = original  # type: ignore[method-assign]


def records(config: Config) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "routing"]


def test_a_run_whose_router_breaks_stops(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, *MOE)
    for line in gloo(2, run_poisoned, config, "layers.1.mixer.router.weight", 3):
        assert line.startswith("the router of layer 1 gave logits that are not finite; lower optimizer.lr")
        assert "\n" not in line
    assert latest_checkpoint(config.run.folder / "checkpoints").name == "step-00000002"
    assert [record["step"] for record in records(config)] == [1, 2]


def test_a_run_reports_its_routing_and_a_skipped_update_leaves_biases(
    gloo: Callable, tmp_path: Path, data: Path
) -> None:
    config = tiny_config(tmp_path, data, *MOE, "train.steps=4", "model.moe.top_k=2", "eval.every_steps=4")
    assert gloo(2, run_poisoned, config, "layers.1.mixer.router.weight.grad", 3) == [4, 4]
    found = records(config)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for record in found:
        assert (record["layers"], record["dropped"]) == ([1], 0)
        assert sum(record["load"][0]) == pytest.approx(1, abs=1e-5)
        assert record["max_violation"][0] == pytest.approx(max(record["load"][0]) * 4 - 1, abs=1e-5)
        assert 0 < record["entropy"][0] <= math.log(4)
    biases = [record["bias"][0] for record in found]
    assert biases[0] != biases[1] == biases[2] != biases[3]
    saved = load_full(latest_checkpoint(config.run.folder / "checkpoints"))["model.layers.1.mixer.router.balance_bias"]
    assert saved.tolist() == biases[3]
