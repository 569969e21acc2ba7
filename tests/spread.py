"""One float64 training step of a small model under a layout: its loss and all its gradients, whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headrace.data import Batch
from headrace.data.config import DataConfig
from headrace.model.config import ModelConfig
from headrace.model.lm import HybridLM
from headrace.model.sequence import SequenceContext, TrainingPass
from headrace.parallel.config import ParallelConfig
from headrace.parallel.fsdp import materialise
from headrace.parallel.mesh import Mesh, World, build_mesh
from headrace.parallel.pipeline import Pipeline
from headrace.parallel.recompute import Recompute
from headrace.parallel.spread import spread_model
from headrace.parallel.stages import cut_stages, stages_of_rank
from headrace.pretrain.config import Config, RunConfig, TrainConfig
from headrace.pretrain.engine import Engine
from tiny import this_world

SEED = 7
Step = tuple[float, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """Random rows: `starts` are tokens that begin a document, the same in all rows but for the last, which has none."""

    count: int
    length: int
    starts: tuple[int, ...] = ()

    def tensors(self, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, targets, some of them ignored, and document starts."""
        generator = torch.Generator().manual_seed(5)
        tokens, targets = torch.randint(vocab, (2, self.count, self.length), generator=generator)
        targets[0, self.length // 3 :: 2] = -100
        reset = torch.zeros(self.count, self.length, dtype=torch.bool)
        reset[: max(1, self.count - 1), list(self.starts)] = True
        return tokens, targets, reset


def one_process(config: ModelConfig, rows: Rows) -> Step:
    """The step on one process, with no parallelism at all."""
    model = HybridLM(config).double()
    model.initialize(SEED)
    tokens, targets, reset = rows.tensors(config.vocab_size)
    training = TrainingPass(1 / (targets != -100).sum().double(), torch.arange(tokens.numel()).view_as(tokens))
    loss_sum, count = model(tokens, SequenceContext(reset_BL=reset, training=training), targets)
    (loss_sum / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss_sum.detach() / count), gradients


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to take: a model, a layout, rows, and how the step is computed."""

    model: ModelConfig
    parallel: ParallelConfig
    rows: Rows
    micro_rows: int = 0
    recompute: Recompute = "none"
    compile: bool = False

    @property
    def config(self) -> Config:
        """The case as the configuration of a run."""
        return Config(
            run=RunConfig(name="case", seed=SEED),
            model=self.model,
            data=DataConfig(folder="none", seq_len=self.rows.length),
            train=TrainConfig(
                steps=1, batch_rows=self.rows.count, micro_batch_rows=self.micro_rows, recompute=self.recompute
            ),
            parallel=self.parallel,
        )


def build_engine(case: Case, mesh: Mesh, world: World) -> Engine:
    """As `pretrain.build.build_engine`, in float64."""

    def build(stage: range | None) -> HybridLM:
        with torch.device("meta"):
            model = HybridLM(case.model, stage).double()
        spread_model(model, mesh, case.parallel, recompute=case.recompute)
        materialise(model, world.device, SEED)
        if case.compile:
            for block in model.layers.values():
                block.compile()
        return model

    if case.parallel.pp == 1:
        return Engine(case.config, world, mesh, [build(None)], None)
    cuts = cut_stages(case.model, case.parallel.num_stages, case.rows.length)
    mine = stages_of_rank(case.parallel, mesh.rank("pp"))
    models = [build(cuts[stage]) for stage in mine]
    return Engine(case.config, world, mesh, models, Pipeline(list(zip(mine, models, strict=True)), mesh, case.parallel))


def take_step(case: Case, mesh: Mesh) -> Step:
    """The step on the ranks of the mesh; gradients of this rank's parameters, whole. Collective."""
    world = this_world()
    engine = build_engine(case, mesh, world)
    each = case.rows.count // mesh.data_ranks
    share = slice(mesh.data_rank * each, (mesh.data_rank + 1) * each)
    tokens, targets, reset = (t[share] for t in case.rows.tensors(case.model.vocab_size))
    loss_sum, count = engine.forward_backward(Batch(tokens, targets, reset, 0))
    dist.all_reduce(loss_sum)
    gradients = {}
    for name, parameter in engine.named_parameters().items():
        if not parameter.requires_grad:
            continue
        assert isinstance(parameter.grad, DTensor), name
        gradients[name] = parameter.grad.full_tensor()
    return float(loss_sum / count), gradients


def spread_step(config: ModelConfig, parallel: ParallelConfig, rows: Rows, recompute: Recompute = "none") -> Step:
    """One case on the ranks of the process group. Collective."""
    world = this_world()
    case = Case(model=config, parallel=parallel, rows=rows, recompute=recompute)
    return take_step(case, build_mesh(parallel, world))


def largest_errors(cases: Sequence[Case], expected: Sequence[Step]) -> list[dict[str, float]]:
    """For cases of one layout: relative errors of the loss and of this rank's gradients, by name. Collective."""
    world = this_world()
    mesh = build_mesh(cases[0].parallel, world)
    return [relative_errors(take_step(case, mesh), step) for case, step in zip(cases, expected, strict=True)]


def relative_errors(found: Step, expected: Step) -> dict[str, float]:
    """Relative errors of the loss and of the gradients, by their norms; a gradient that is not expected is infinite."""
    errors = {"loss": abs(found[0] - expected[0]) / abs(expected[0])}
    for name, gradient in found[1].items():
        known = expected[1].get(name)
        errors[name] = float("inf") if known is None else float((gradient - known).norm() / known.norm())
    return errors


def differences(found: Step, expected: Step, limit: float = 1e-9) -> list[str]:
    """What is further than `limit` from the expected step, and what is missing."""
    missing = [f"no gradient of {name}" for name in expected[1].keys() - found[1].keys()]
    errors = relative_errors(found, expected)
    return missing + [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= limit]
