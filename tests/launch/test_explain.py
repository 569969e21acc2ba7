"""`headrace explain`: what the dry run finds is what real processes hold and send."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch

from headrace.data import Batch
from headrace.launch.cli import main
from headrace.launch.explain import format_explanation
from headrace.model.ffns.moe import MoEConfig
from headrace.model.presets import PRESETS
from headrace.parallel.dry_run import share_that_needs
from headrace.parallel.mesh import build_mesh
from headrace.parallel.traffic import Sent, Traffic
from headrace.pretrain.build import build_engine
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.explain import default_world, explain
from headrace.pretrain.optimizers.build import build_optimizers
from headrace.pretrain.optimizers.sharded import local_part
from tiny import this_world

CONFIG = """
[run]
name = "explained"
[data]
folder = "there-is-no-data"
seq_len = 48
[model]
vocab_size = 320
d_model = 16
pattern = "2*(mamba2 mlp) attention mlp"
[model.mamba2]
head_dim = 4
d_state = 8
num_groups = 1
chunk_size = 8
[model.attention]
num_heads = 4
num_kv_heads = 2
rope_fraction = 1.0
[train]
steps = 6
batch_rows = 20
micro_batch_rows = 2
precision = "bfloat16"
[optimizer]
kind = "muon"
[schedule]
warmup_steps = 2
"""

# Every token goes to every expert, so that what is sent does not depend on decisions, which a dry run cannot know.
MOE = ["model.pattern=2*(mamba2 moe) attention moe", "model.moe.num_experts=4", "model.moe.top_k=4"]
LAYOUTS = {
    "tp cp": ["parallel.tp=2", "parallel.cp=2", "train.recompute=full"],
    "fsdp tp": ["parallel.tp=2", "parallel.dp_shard=2", "parallel.reshard_after_forward=false"],
    "fsdp cp zigzag": ["parallel.cp=2", "parallel.dp_shard=2", "parallel.cp_layout=zigzag"],
    "hsdp": ["parallel.dp_replicate=2", "parallel.dp_shard=2", "train.recompute=selective"],
    "cp": ["parallel.cp=4", "parallel.cp_virtual=2", "parallel.cp_exchange=doubling", "optimizer.kind=adamw"],
    "pp": ["parallel.pp=2", "parallel.tp=2", "train.batch_rows=4"],
    "interleaved": ["parallel.pp=2", "parallel.pp_stages=2", "parallel.pp_schedule=interleaved", "train.batch_rows=16"],
    "ep": ["parallel.dp_shard=4", "parallel.ep=2", *MOE, "model.moe.d_shared=8", "train.batch_rows=12"],
    "ep tp": ["parallel.dp_shard=2", "parallel.tp=2", "parallel.ep=2", *MOE, "model.moe.balance=bias"],
    "ep over tp": ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "parallel.ep_over_tp=true", *MOE],
    "zero bubble": ["parallel.pp=2", "parallel.pp_stages=2", "parallel.pp_schedule=zero_bubble", "parallel.cp=2"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "explained.toml"
    found.write_text(CONFIG)
    return found


def real_update(config: Config) -> tuple[Counter[Sent], dict[str, int], int]:
    """What one real update on this rank sends, and bytes of its parameters by name and of its optimizers."""
    world = this_world()
    mesh = build_mesh(config.parallel, world)
    engine = build_engine(config, mesh, world)
    optimizers = build_optimizers(engine.models, config.optimizer)
    rows = config.train.batch_rows // mesh.data_ranks
    tokens = torch.randint(config.model.vocab_size, (rows, config.data.seq_len))
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    reset[:, 7] = True
    with Traffic(mesh, engine.models) as traffic:
        engine.forward_backward(Batch(tokens, tokens, reset, 0))
        engine.clip_gradients(config.train.clip_norm)
        for optimizer in optimizers:
            optimizer.step(1.0, torch.zeros(()))
        engine.routing.finish_step(engine.models, torch.zeros(()))
    parameters = {name: local_part(p).nbytes for name, p in engine.named_parameters().items()}
    state = sum(local_part(t).nbytes for optimizer in optimizers for t in optimizer.state().values())
    return Counter(traffic.sent), parameters, state


@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_dry_run_is_what_really_happens(gloo: Callable, path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides, 4)
    really = gloo(4, real_update, config)
    for rank in (0, 3):
        found, (sent, parameters, state) = explain(config, 4, rank), really[rank]
        assert (found.sent - sent, sent - found.sent) == ({}, {})
        assert {held.name: held.parameter_bytes for held in found.held} == parameters
        assert sum(held.optimizer_bytes for held in found.held) == state
        assert all(len(line) <= 120 for line in format_explanation(found).splitlines())


def test_a_page(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(path), "--world", "8", "--rank", "5", "parallel.tp=4", "parallel.cp=2"]) == 0
    page = capsys.readouterr().out
    for part in (
        "8 processes: pp 1 x dp_replicate 1 x dp_shard 1 x cp 2 x tp 4",
        "rank 5 (cp 1, tp 1) holds layers 0-5 of 6",
        "tokens 24-47 of rows of 48, shared out over 4 tp ranks",
        "layers 0,2 mamba2 x2, each",
        "layers 1,3,5 mlp x3, each",
        "layer 4 attention",
        "fsdp: Shard(0), tp: copied (groups=1)",
        "over tp:",
        "over cp:",
    ):
        assert part in page, part


def test_a_page_of_experts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.ep=4", "parallel.tp=2", "parallel.dp_replicate=2", "--rank", "6", "train.batch_rows=16"]
    assert main(["explain", str(path), *layout, *MOE, "model.moe.num_experts=16", "model.moe.d_shared=8"]) == 0
    page = capsys.readouterr().out
    model = load_config(path, [*MOE, "model.moe.num_experts=16", "model.moe.d_shared=8"]).model
    for part in (
        "16 processes: pp 1 x dp_replicate 2 x dp_shard 4 x cp 1 x tp 2",
        "experts 12-15 of 16 are here (ep 4, carved out of dp_shard x cp; expert_shard 1); a token goes to 4",
        "dp_replicate: Replicate, ep: Shard(0), tp: Shard(2)",
        f"{model.num_params():,} parameters, of which each token meets {model.num_active_params():,}",
        "all_to_all",
        "as many tokens are counted as are expected",
    ):
        assert part in page, part
    assert all(len(line) <= 120 for line in page.splitlines())


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups", "own"),
    [(8, 2, 1, 1, 4), (8, 2, 4, 2, 2), (12, 3, 2, 1, 4), (12, 3, 3, 2, 6), (6, 6, 1, 1, 2)],
)
def test_how_many_tokens_need_a_rank(experts: int, top_k: int, groups: int, top_groups: int, own: int) -> None:
    """By going through all choices that a router can make."""
    config = MoEConfig(num_experts=experts, top_k=top_k, num_groups=groups, top_groups=top_groups)
    there = range(own, 2 * own)
    choices = [
        set(choice) & set(there)
        for chosen in combinations(range(groups), top_groups)
        for choice in combinations([x for x in range(experts) if x // (experts // groups) in chosen], top_k)
    ]
    assert share_that_needs(config, there) == pytest.approx(sum(map(bool, choices)) / len(choices))


def test_one_process_sends_nothing(path: Path) -> None:
    config = load_config(path)
    assert default_world(config) == 1
    page = format_explanation(explain(config, 1, 0))
    assert "nothing is sent" in page
    assert f"the whole model has {config.model.num_params():,} parameters" in page


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--world", "6", "parallel.tp=4"], "does not divide the 6 processes"),
        (
            ["model.pattern=mlp", "parallel.tp=3", "model.vocab_size=300", "model.mlp.d_hidden=16"],
            "tp=3 does not divide",
        ),
        (["--world", "0"], "--world=0 must be at least 1"),
        (["--rank", "2"], "--rank=2 must be between 0 and 0"),
        (["--world", "7"], "batch_rows=20 does not split over 7"),
    ],
    ids=" ".join,
)
def test_mistakes_get_one_line(path: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_published_model_on_128_processes_takes_seconds_and_no_memory(path: Path) -> None:
    text = path.read_text().partition("[model]")[0] + "[train]\nsteps = 1000\nbatch_rows = 64\n[model]\n"
    preset = PRESETS["mamba2-2.7b"]
    text += "".join(f"{name} = {getattr(preset, name)!r}\n" for name in ("vocab_size", "d_model", "pattern"))
    path.write_text(text.replace("'", '"'))
    code = (
        "import resource, sys, time; from headrace.launch.cli import main; status = main(sys.argv[1:]); "
        "print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    arguments = ["explain", str(path), "data.seq_len=4096", "parallel.tp=8", "parallel.dp_shard=16"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    *page, measured = result.stdout.splitlines()
    seconds, kilobytes = measured.split()
    assert "128 processes" in page[0]
    assert any("layers 0-63 mamba2 x64, each" in line for line in page)
    assert float(seconds) < 40
    assert int(kilobytes) < 1_000_000  # the parameters alone are eleven times that
