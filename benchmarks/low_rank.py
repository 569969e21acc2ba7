"""Low-rank and reduced-state optimizers beside AdamW: held-out loss, state, bytes sent and time of an update.

`python benchmarks/low_rank.py` needs the corpus of `make train` (`headrace prepare`); runs that are there are not run
again. The quickstart's model with shorter rows; AdamW updates what is not a matrix in all runs. Every learning rate
below is tried times each of `--factors`, and the best held-out loss counts. State is that of the matrices;
bytes are what rank 0 of two FSDP ranks sends for the update itself, gradients not counted; times are of one process.
"""

import argparse
import time
from dataclasses import dataclass, replace

import torch
from learning import CONFIG, side_by_side
from torch.distributed.tensor import DTensor, Shard

from headrace.model.lm import HybridLM
from headrace.parallel.config import ParallelConfig
from headrace.parallel.dry_run import fake_world
from headrace.parallel.traffic import Traffic
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.config import OptimizerConfig
from headrace.pretrain.optimizers.low_rank.optimizer import LowRank
from headrace.pretrain.optimizers.sharded import Optimizer

# A quarter of the model's width, as Subspace-Momentum's paper has it; narrower matrices go to AdamW.
RANK = 48
BASE = (
    "data.seq_len=256",
    "optimizer.lr=3e-3",
    f"optimizer.low_rank.rank={RANK}",
    f"optimizer.low_rank.min_side={RANK}",
    "optimizer.low_rank.refresh_steps=100",
    "eval.window=256",
    "eval.max_tokens=40000",
    "log.every_steps=20",
    "checkpoint.keep_last=1",
)


@dataclass(frozen=True)
class Rival:
    """An optimizer of the table.

    Attributes:
        lr: peak learning rate of the matrices.
        claim: what its paper says.
        more: further options.
    """

    lr: float
    claim: str
    more: tuple[str, ...] = ()


RIVALS = {
    "adamw": Rival(3e-3, "-"),
    "galore": Rival(1.2e-2, "loss of full rank, up to 65.5% less state (2403.03507)"),
    "galore-8bit": Rival(1.2e-2, "82.5% less state (2403.03507)", ("optimizer.low_rank.state_bits=8",)),
    "online_subspace": Rival(1.2e-2, "lower perplexity than GaLore, no SVD (2408.12857)"),
    "grass": Rival(1.2e-2, "near full rank, up to 2x throughput (2406.17660)"),
    "flora": Rival(6e-3, "loss of full momentum in sublinear memory (2402.03293)"),
    "grass_walk": Rival(1.2e-2, "better than other low-rank methods (2510.01878)"),
    "grass_jump": Rival(1.2e-2, "better than other low-rank methods (2510.01878)"),
    "subset_norm": Rival(3e-2, "second moment of O(sqrt(d)) (2411.07120)"),
    "subspace_momentum": Rival(3e-2, "Adam's loss in half the tokens, 20% of its state (2411.07120)"),
}


def options_of(name: str, factor: float, steps: int) -> list[str]:
    """The overrides of a run."""
    rival, method = RIVALS[name], name.removesuffix("-8bit")
    chosen = [f"optimizer.lr={rival.lr * factor}"]
    if method != "adamw":
        chosen = [
            "optimizer.kind=low_rank",
            f"optimizer.low_rank.method={method}",
            f"optimizer.low_rank.lr={rival.lr * factor}",
            *rival.more,
        ]
    else:
        chosen.append("optimizer.kind=adamw")
    return [
        *BASE,
        *chosen,
        f"run.name=low-rank-{name}-{factor:g}x-{steps}",
        f"train.steps={steps}",
        f"schedule.warmup_steps={min(50, max(1, steps // 10))}",
        f"eval.every_steps={steps}",
        f"checkpoint.every_steps={steps}",
    ]


def matrices_of(config: Config) -> dict[str, torch.Tensor]:
    """The parameters that low-rank methods update, with gradients."""
    torch.manual_seed(0)
    model = HybridLM(config.model)
    model.initialize(0)
    kinds = model.parameter_kinds()
    matrices = {name: p for name, p in model.named_parameters() if kinds[name] == "matrix" and min(p.shape) >= RANK}
    for parameter in matrices.values():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return matrices


def build(matrices: dict[str, torch.Tensor], config: OptimizerConfig) -> Optimizer:
    """What updates them."""
    shared = {
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": dict.fromkeys(matrices, config.weight_decay),
    }
    if config.kind == "low_rank":
        return LowRank(matrices, config.low_rank, **shared)
    return AdamW(matrices, lr=config.lr, **shared)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of state, counters aside."""
    return sum(tensor.nbytes for slot, tensor in optimizer.state().items() if not slot.startswith("step."))


def seconds_of_updates(optimizer: Optimizer, repeats: int = 5) -> tuple[float, float]:
    """Of the first update, which chooses a basis, and of one that does not."""
    skip, times = torch.zeros(()), []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        optimizer.step(1.0, skip)
        times.append(time.perf_counter() - started)
    return times[0], sorted(times[1:])[repeats // 2]


def sent_by_update(matrices: dict[str, torch.Tensor], config: OptimizerConfig) -> int:
    """Bytes that rank 0 of two sends for an ordinary update under FSDP; none of them is sent, or computed."""
    with fake_world(ParallelConfig(), 0, 2) as fake, fake.tensors(), Traffic(fake.mesh) as traffic:
        cut = {}
        for name, parameter in matrices.items():
            local = torch.zeros(len(parameter) // 2, *parameter.shape[1:])
            cut[name], gradient = (
                DTensor.from_local(t, fake.mesh.fsdp, [Shard(0)]) for t in (local, torch.zeros_like(local))
            )
            cut[name].grad = gradient
        build(cut, config).step(1.0, torch.zeros(()))
    return sum(entry.sent for entry in traffic.sent)


def row_of(name: str, losses: dict[float, float], steps: int, adam_bytes: int) -> str:
    """A line of the table; losses are by factor."""
    best = min(losses, key=lambda factor: losses[factor])
    config = load_config(CONFIG, options_of(name, best, steps))
    matrices = matrices_of(config)
    optimizer = build(matrices, config.optimizer)
    kept, numbers = state_bytes(optimizer), sum(parameter.numel() for parameter in matrices.values())
    first, ordinary = seconds_of_updates(optimizer)
    sent = sent_by_update(matrices, config.optimizer)
    each = replace(config.optimizer, low_rank=replace(config.optimizer.low_rank, refresh_steps=1))
    choosing = sent_by_update(matrices, each)
    rival = RIVALS[name]
    return (
        f"| {name} | {losses[best]:.4f} | {rival.lr * best:g} | {kept / numbers:.3f} | {kept / adam_bytes:.3f} | "
        f"{sent:,} | {choosing:,} | {ordinary * 1e3:.1f} | {first * 1e3:.1f} | {rival.claim} |"
    )


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--only", nargs="+", choices=tuple(RIVALS), default=tuple(RIVALS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # times on shared cores: several threads would wait for each other
    adam_config = load_config(CONFIG, options_of("adamw", 1.0, options.steps))
    adam_bytes = state_bytes(build(matrices_of(adam_config), adam_config.optimizer))
    print(
        "| optimizer | held-out loss | lr | state bytes per number | of AdamW's | bytes sent | with a new basis | ms | "
        "with a new basis | its paper |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    tried = [(name, factor) for name in options.only for factor in options.factors]
    curves = side_by_side({(name, factor): options_of(name, factor, options.steps) for name, factor in tried})
    for name in options.only:
        losses = {factor: curves[name, factor][-1][1] for factor in options.factors}
        print(row_of(name, losses, options.steps, adam_bytes), flush=True)


if __name__ == "__main__":
    main()
