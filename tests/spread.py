"""One float64 training step of a small model under a layout: its loss and all its gradients, whole."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headrace.model.config import ModelConfig
from headrace.model.lm import HybridLM
from headrace.model.sequence import SequenceContext
from headrace.parallel.config import ParallelConfig
from headrace.parallel.context import share_row
from headrace.parallel.fsdp import materialise
from headrace.parallel.mesh import World, build_mesh
from headrace.parallel.recompute import Recompute
from headrace.parallel.spread import spread_model
from headrace.parallel.tensor import sum_replicated_gradients

Step = tuple[float, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """Random rows: `starts` are tokens that begin a document, the same in all rows but for the last, which has none."""

    count: int
    length: int
    starts: tuple[int, ...] = ()

    def tensors(self, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, targets, some of them ignored, and document starts."""
        generator = torch.Generator().manual_seed(5)
        tokens, targets = torch.randint(vocab, (2, self.count, self.length), generator=generator)
        targets[0, self.length // 3 :: 2] = -100
        if not self.starts:
            return tokens, targets, None
        reset = torch.zeros(self.count, self.length, dtype=torch.bool)
        reset[: max(1, self.count - 1), list(self.starts)] = True
        return tokens, targets, reset


def one_process(config: ModelConfig, rows: Rows) -> Step:
    """The step on one process, with no parallelism at all."""
    model = HybridLM(config).double()
    model.initialize(7)
    tokens, targets, reset = rows.tensors(config.vocab_size)
    loss_sum, count = model(tokens, SequenceContext(reset_BL=reset), targets)
    (loss_sum / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss_sum.detach() / count), gradients


def spread_step(config: ModelConfig, parallel: ParallelConfig, rows: Rows, recompute: Recompute = "none") -> Step:
    """The same step on the ranks of the process group. Collective."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    mesh = build_mesh(parallel, world)
    with torch.device("meta"):
        model = HybridLM(config).double()
    spread_model(model, mesh, parallel, recompute=recompute)
    materialise(model, world.device, 7)
    tokens, targets, reset = rows.tensors(config.vocab_size)
    count = int((targets != -100).sum())
    share = slice(mesh.data_rank, None, mesh.data_ranks)
    mine = None if reset is None else reset[share]
    (tokens, targets), seq = share_row(parallel, mesh.group("cp"), [tokens[share], targets[share]], mine)
    loss_sum, _ = model(tokens, seq, targets)
    (loss_sum * mesh.grad_ranks / count).backward()
    sum_replicated_gradients(model, mesh)
    total = loss_sum.detach() / count / mesh.size("tp")
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        gradients[name] = parameter.grad.full_tensor()
    return float(total), gradients


def differences(found: Step, expected: Step, limit: float = 1e-9) -> list[str]:
    """What is further than `limit` from the expected step: the loss, or a gradient by its norm."""
    wrong = []
    if abs(found[0] - expected[0]) > limit * abs(expected[0]):
        wrong.append(f"loss {found[0]} instead of {expected[0]}")
    if found[1].keys() != expected[1].keys():
        wrong.append(f"gradients of {sorted(found[1].keys() ^ expected[1].keys())}")
    for name, gradient in found[1].items():
        error = float((gradient - expected[1][name]).norm() / expected[1][name].norm())
        if not error <= limit:
            wrong.append(f"{name}: {error:.1e}")
    return wrong
