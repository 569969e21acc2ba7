"""The model as this process holds it, whole or as pipeline stages, and the passes that go through it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch
from ..model.lm import HybridLM
from ..model.sequence import LayerStates, SequenceContext, TrainingPass
from ..parallel.comm import sum_over_ranks
from ..parallel.context import share_row
from ..parallel.fsdp import sync_gradients
from ..parallel.grads import clip_gradients
from ..parallel.mesh import Mesh, World
from ..parallel.pipeline import Pipeline
from ..parallel.tensor import sum_replicated_gradients
from .config import Config
from .routing import RoutingTally


@dataclass
class Engine:
    """A spread model and the passes through it; everything here is collective.

    Attributes:
        models: the whole model alone, or this rank's pipeline stages of it.
        pipeline: runs the stages; None where the model is whole.
        routing: what mixture-of-experts layers tell.
    """

    config: Config
    world: World
    mesh: Mesh
    models: list[HybridLM]
    pipeline: Pipeline | None

    def __post_init__(self) -> None:
        self.routing = RoutingTally(self.config.model, self.world.device)
        if self.pipeline is not None:
            self.pipeline.tell = self.routing.add

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """This process's parameters by the names they have in the whole model."""
        return {name: parameter for model in self.models for name, parameter in model.named_parameters()}

    def forward_backward(self, batch: Batch) -> tuple[Tensor, int]:
        """Add up the gradients of one batch's mean loss per target token.

        The mean is over the targets of all ranks and micro-batches together, so it does not depend on how rows and
        tokens are dealt.

        Returns:
            This rank's share of the summed loss (a device scalar, float32) and the number of targets on all ranks.
        """
        copies = self.config.parallel.model_ranks
        targets = int(sum_over_ranks((batch.targets_BL != -100).sum())) // copies
        # FSDP averages gradients over the ranks that share rows and tokens out; the loss is summed over them.
        scale = torch.tensor(self.mesh.grad_ranks / max(1, targets), dtype=torch.float64, device=self.world.device)
        micro_rows = self.config.train.micro_batch_rows or batch.tokens_BL.shape[0]
        tensors = [
            t.to(self.world.device, non_blocking=True)
            for t in (batch.tokens_BL, batch.targets_BL, batch.reset_BL, self._numbers(batch))
        ]
        if self.pipeline is None:
            total = self._whole_model(tensors, micro_rows, scale)
        else:
            *rows, number_BL = tensors
            total = self.pipeline.step(*rows, number_BL=number_BL, micro_rows=micro_rows, scale=scale)
            self.pipeline.sum_tied_gradients()
        for model in self.models:
            sum_replicated_gradients(model, self.mesh)
        return total / self.mesh.size("tp"), targets

    def _numbers(self, batch: Batch) -> Tensor:
        """The number of each token of this process's rows in the run, the same whoever works on it."""
        rows, length = batch.tokens_BL.shape
        first = batch.first_row + self.mesh.data_rank * rows
        return torch.arange(first * length, (first + rows) * length).view(rows, length)

    def _whole_model(self, tensors: list[Tensor], micro_rows: int, scale: Tensor) -> Tensor:
        (model,) = self.models
        rows = len(tensors[0])
        losses = []
        for start in range(0, rows, micro_rows):
            sync_gradients(model, start + micro_rows >= rows)
            tokens_BL, targets_BL, reset_BL, number_BL = (t[start : start + micro_rows] for t in tensors)
            training = TrainingPass(scale, number_BL)
            rows_BL = [tokens_BL, targets_BL]
            (tokens_BL, targets_BL), seq = share_row(self.config.parallel, self.mesh, rows_BL, reset_BL, training)
            loss_sum, _ = model(tokens_BL, seq, targets_BL)
            (loss_sum * scale).backward()
            self.routing.add(training.told)
            losses.append(loss_sum.detach())
        return torch.stack(losses).sum()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients down to the global norm `max_norm` (0: leave them); returns the norm before, on all ranks."""
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for model in self.models:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    is_copy = name == "embed.weight" and not model.is_first
                    (copies if is_copy else counted).append(parameter.grad)
        return clip_gradients(counted, max_norm, copies=copies, stages=self.mesh.group("pp"))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for model in self.models:
            model.zero_grad(set_to_none=True)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        for model in self.models:
            model.train(mode)

    # What evaluation asks of a model (see `evaluate.Scorer`). Ranks that share rows or tokens in training read
    # documents of their own.

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.world.device

    @property
    def rank(self) -> int:
        """Which share of the documents this process reads."""
        return self.mesh.data_rank * self.mesh.size("cp") + self.mesh.rank("cp")

    @property
    def ranks(self) -> int:
        """Shares of the documents."""
        return self.mesh.grad_ranks

    @property
    def copies(self) -> int:
        """Processes that read each document together."""
        return self.world.size // self.mesh.grad_ranks

    def new_states(self) -> list[LayerStates]:
        """States before a document."""
        return [LayerStates() for _ in self.models]

    def score(self, tokens_BL: Tensor, targets_BL: Tensor, states: list[LayerStates]) -> tuple[Tensor, Tensor]:
        """Summed loss of a window of a document and its number of targets; `states` go on to the next."""
        if self.pipeline is not None:
            return self.pipeline.forward_only(tokens_BL, targets_BL, states)
        (model,), (state,) = self.models, states
        loss_sum, targets = model(tokens_BL, SequenceContext(states=state), targets_BL)
        return loss_sum, targets
