"""Pipeline parallelism: micro-batches pass through stretches of layers on different ranks, by torch's schedules.

Every rank of the pipeline has its data rank's rows, so that only activations travel: forward the residual stream,
backward its gradient, each the share of tokens that a context- and tensor-parallel rank holds.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..errors import UserError
from ..model.lm import HybridLM
from ..model.sequence import LayerStates, SequenceContext, TrainingPass
from .comm import Message, finish, start_messages, token_share
from .config import ParallelConfig
from .context import share_row
from .mesh import Mesh
from .stages import num_micro_batches, pipeline_problems

Schedule = Schedule1F1B | ScheduleInterleaved1F1B | ScheduleInterleavedZeroBubble


class Pipeline:
    """This rank's stages of a model, and the passes through all ranks' stages.

    Args:
        stages: number and model of each stage that `stages_of_rank` gives this rank, in order; spread by `spread_model`
            and filled.
        mesh: axes of the run.
        config: how it is laid out.
        compute_dtype: as given to `spread_model`.

    `tell` is given what layers told of each micro-batch's pass; whoever wants it sets it.

    Building one is collective over `pp`, as are all methods.
    """

    def __init__(
        self,
        stages: list[tuple[int, HybridLM]],
        mesh: Mesh,
        config: ParallelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.models = dict(stages)
        self.tell: Callable[[dict[int, Tensor]], None] = lambda told: None
        self.mesh, self.config = mesh, config
        self.device, dtype = _device_and_dtype(stages[0][1], compute_dtype)
        model_config = stages[0][1].config
        if model_config.residual_in_fp32:
            dtype = torch.promote_types(dtype, torch.float32)
        self._like_activation = torch.empty(0, model_config.d_model, dtype=dtype, device="meta")
        self._tied = model_config.tie_embeddings and config.num_stages > 1
        self._built: tuple[tuple[int, int, int], Schedule, list[_Stage]] | None = None
        for model in self.models.values():
            _keep_gathered(model, blocks=config.pp_schedule == "zero_bubble")
        # NCCL makes a communicator when all its ranks first meet: here, not between stages that wait for each other.
        dist.all_reduce(torch.zeros((), device=self.device), group=mesh.group("pp"))

    def step(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        reset_BL: Tensor | None,
        *,
        number_BL: Tensor,
        micro_rows: int,
        scale: Tensor,
    ) -> Tensor:
        """Add up the gradients of `scale` times the summed loss of these rows. Collective over all mesh axes.

        Gradients are averaged over FSDP's ranks once, after the last micro-batch; to do afterwards, once an update:
        `sum_replicated_gradients` of each stage, `sum_tied_gradients`. All calls should have the same shapes: others
        make new buffers.

        Args:
            tokens_BL: this data rank's rows, int64, the same on all its pp, cp and tp ranks.
            targets_BL: as in `HybridLM`.
            reset_BL: as in `SequenceContext`.
            number_BL: as in `TrainingPass`.
            micro_rows: rows that pass through the stages at a time; a last micro-batch with fewer is filled up.
            scale: factor of the loss, a scalar, the same on all ranks.

        Returns:
            The summed loss, a scalar on the device, unscaled: of this rank's rows (under context parallelism, of its
            tokens of them) where the last stage is, zero elsewhere; the same on all tp ranks. At least float32.

        Raises:
            UserError: as many micro-batches cannot be scheduled (`pipeline_problems`).
        """
        count = num_micro_batches(len(tokens_BL), micro_rows)
        rows = {"tokens_BL": (tokens_BL, 0), "targets_BL": (targets_BL, -100), "number_BL": (number_BL, -1)}
        if reset_BL is not None:
            rows["reset_BL"] = reset_BL, 0
        # Rows without targets add exactly nothing.
        missing = count * micro_rows - len(tokens_BL)
        filled: dict[str, Any] = {
            name: F.pad(tensor.to(self.device, non_blocking=True), (0, 0, 0, missing), value=value)
            for name, (tensor, value) in rows.items()
        }
        schedule, stages = self._schedule(count, micro_rows, tokens_BL.shape[1])
        for stage in stages:
            stage.loss_sum.zero_()
            stage.scale = scale
        first = (filled["tokens_BL"],) if 0 in self.models else ()
        target = filled["targets_BL"] if stages[-1].is_last else None
        schedule.step(*first, target=target, return_outputs=False, **filled)
        return stages[-1].loss_sum.clone()

    def sum_tied_gradients(self) -> None:
        """Add up the gradients of the embedding and the output head where they are one matrix on two stages.

        To be called once an update, after its last `step`: both copies then have the same gradient, bit by bit. Where
        they are one parameter, or untied, nothing happens. Collective over `pp`: one message each way between its ends.
        """
        if not self._tied:
            return
        rank, last = self.mesh.rank("pp"), self.config.pp - 1
        if rank not in (0, last):
            return
        own = _local_gradient(self.models[0 if rank == 0 else self.config.num_stages - 1])
        other = torch.empty_like(own, memory_format=torch.contiguous_format)
        self._relay([(last - rank, own)], [(last - rank, other)])
        own.add_(other)

    @torch.no_grad()
    def forward_only(
        self, tokens_BL: Tensor, targets_BL: Tensor, states_by_stage: list[LayerStates]
    ) -> tuple[Tensor, Tensor]:
        """Score whole rows, the same on all ranks of `pp` and `tp`; no context parallelism. Collective.

        Args:
            tokens_BL: int64, on the device.
            targets_BL: as in `HybridLM`.
            states_by_stage: one for each of this rank's stages; they carry on to the rows' next piece.

        Returns:
            The summed loss, float64, and the number of targets, int64, scalars on the device of every `pp` rank.
        """
        ranks, rank = self.config.pp, self.mesh.rank("pp")
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        x_BLD: Tensor | None = None
        for (stage, model), states in zip(self.models.items(), states_by_stage, strict=True):
            if stage > 0:
                x_BLD = torch.empty_like(self._activation(*tokens_BL.shape), device=self.device)
                self._relay([], [((rank - 1) % ranks, x_BLD)])
            out = model(tokens_BL, SequenceContext(states=states), targets_BL, inflow_BLD=x_BLD)
            if model.is_last:
                found = torch.stack([out[0].double(), out[1].double()])
            else:
                self._relay([((rank + 1) % ranks, out)], [])
        dist.broadcast(found, group=self.mesh.group("pp"), group_src=ranks - 1)
        return found[0], found[1].long()

    def _relay(self, sends: list[Message], receives: list[Message]) -> None:
        """Messages along `pp`; a rank that has no share of the tokens, or of a matrix, sends and expects none."""
        sends, receives = ([m for m in messages if m[1].numel()] for messages in (sends, receives))
        finish(start_messages(sends, receives, self.mesh.group("pp")))

    def _activation(self, rows: int, length: int) -> Tensor:
        """What goes from stage to stage for tokens of this shape, on the meta device."""
        if self.config.tp == 1:
            return self._like_activation.new_empty(rows, length, self._like_activation.shape[1])
        share = token_share(rows * length, self.mesh.group("tp"))
        return self._like_activation.new_empty(1, share.stop - share.start, self._like_activation.shape[1])

    def _schedule(self, count: int, micro_rows: int, length: int) -> tuple[Schedule, list["_Stage"]]:
        key = count, micro_rows, length
        if self._built is None or self._built[0] != key:
            if problems := pipeline_problems(self.config, count * micro_rows, micro_rows):
                raise UserError("; ".join(problems), everywhere=True)
            stages: list[Any] = [
                _Stage(self, number, model, micro_rows, length) for number, model in self.models.items()
            ]
            options: dict[str, Any] = {"loss_fn": stages[-1].scaled, "scale_grads": False}
            schedule: Schedule
            if self.config.pp_schedule == "1f1b":
                schedule = Schedule1F1B(stages[0], count, **options)
            elif self.config.pp_schedule == "interleaved":
                schedule = ScheduleInterleaved1F1B(stages, count, **options)
            else:
                schedule = ScheduleInterleavedZeroBubble(stages, count, **options)
            self._built = key, schedule, stages
        return self._built[1:]


class _Stage(PipelineStage):
    """One stage as torch's schedules run it: a micro-batch's context is made where it is needed."""

    def __init__(self, pipeline: Pipeline, number: int, model: HybridLM, micro_rows: int, length: int) -> None:
        self.config, self.mesh = pipeline.config, pipeline.mesh
        tokens_BL = torch.empty(micro_rows, length, dtype=torch.int64, device="meta")
        (own_BL,), _ = share_row(self.config, self.mesh, [tokens_BL], None)
        activation = pipeline._activation(*own_BL.shape).requires_grad_()
        loss = torch.empty((), dtype=torch.promote_types(activation.dtype, torch.float32), device="meta")
        super().__init__(
            model,
            number,
            self.config.num_stages,
            pipeline.device,
            # Given both, torch asks no other rank for them.
            input_args=activation if number else tokens_BL,
            output_args=loss if model.is_last else activation,
            group=pipeline.mesh.group("pp"),
        )
        self.pipeline = pipeline
        self.scale = torch.ones((), device=pipeline.device)
        self.loss_sum = torch.zeros_like(loss, device=pipeline.device)

    def scaled(self, loss_sum: Tensor, _targets_BL: Tensor) -> Tensor:
        """What the schedule takes as the loss."""
        return loss_sum * self.scale

    # The method names and their arguments are torch's.

    def forward_maybe_with_nosync(
        self, x: Tensor, *, tokens_BL: Tensor, targets_BL: Tensor, number_BL: Tensor, reset_BL: Tensor | None = None
    ) -> Tensor:
        """The stage's forward pass; `x` is what came from the stage before."""
        training = TrainingPass(self.scale, number_BL)
        (tokens_BL, targets_BL), seq = share_row(self.config, self.mesh, [tokens_BL, targets_BL], reset_BL, training)
        out = self.submod(tokens_BL, seq, targets_BL, inflow_BLD=None if self.is_first else x)
        self.pipeline.tell(training.told)
        if not self.is_last:
            return out.contiguous()
        self.loss_sum += out[0].detach()
        return out[0]

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        """The backward pass, whole as torch does it, or one of its halves."""
        if backward_type == "full":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "input":
            assert isinstance(self.submod, FSDPModule)
            self.submod.set_is_last_backward(False)
            self.submod.set_reshard_after_backward(False)
            self.submod.set_requires_gradient_sync(False)
            (output,), gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
            inflow, *others = bwd_kwargs["input_values"]
            split = SplitBackward(output, inflow)
            return (split.to_inflow(None if gradients is None else gradients[0]), *[None] * len(others)), split
        bwd_kwargs["param_groups"].to_parameters()
        # Parameters' gradients came without FSDP's hooks: let it add them to those that it keeps in its reduce dtype.
        fully_shard.state(self.submod)._root_post_backward_final_callback()  # type: ignore[attr-defined]
        return (), None


class SplitBackward:
    """A stage's backward pass in two halves: to what came in, at once, and to the parameters, when there is time.

    On the way from the output to the inflow, operators at which a parameter's branch joins are *forks*. The first half
    notes the gradients that reach them; the second goes from there into the branches. Forks that a parameter joins
    together are taken together; an operator with parameters is run in both halves.

    torch's own halves do not fit all operators: those of 2.11 add up the gradients of a fork's several outputs, those
    of 2.13 fail where a parameter joins forks that others have joined apart.

    Args:
        output: of the stage, of any shape.
        inflow: a leaf.
    """

    def __init__(self, output: Tensor, inflow: Tensor) -> None:
        assert output.grad_fn is not None
        self._output, self._inflow = output, inflow
        users, leaves = _walk(output.grad_fn)
        (entry,) = (node for node in leaves if node.variable is inflow)
        on_the_way, _ = _reached(entry, users, set())
        self._groups: list[tuple[set[Node], list[Tensor]]] = []
        for node in leaves:
            if node is entry:
                continue
            _, forks = _reached(node, users, on_the_way)
            parameters = [node.variable]
            apart = []
            for group in self._groups:
                if group[0] & forks:
                    forks, parameters = group[0] | forks, group[1] + parameters
                else:
                    apart.append(group)
            self._groups = [*apart, (forks, parameters)]
        self._arrived: dict[Node, tuple[Tensor | None, ...]] = {}

    def to_inflow(self, gradient: Tensor | None) -> Tensor:
        """The gradient of the inflow, given that of the output (None: one)."""

        def note(fork: Node) -> Any:
            return fork.register_prehook(lambda gradients: self._arrived.__setitem__(fork, gradients))

        hooks = [note(fork) for forks, _ in self._groups for fork in forks]
        (found,) = torch.autograd.grad(self._output, self._inflow, gradient, retain_graph=True)
        for hook in hooks:
            hook.remove()
        if not self._output._is_view():
            self._output.detach_()  # frees what the second half does not need
        return found.contiguous()

    def to_parameters(self) -> None:
        """Add the parameters' gradients to their `.grad`."""
        for forks, parameters in self._groups:
            # Of forks on each other's way, each gets what it got in the first half, and not what comes from here too.
            hooks = [fork.register_prehook(lambda _, fork=fork: self._arrived[fork]) for fork in forks]
            edges, gradients = [], []
            for fork in forks:
                for number, gradient in enumerate(self._arrived[fork]):
                    if gradient is not None:
                        edges.append(GradientEdge(fork, number))
                        gradients.append(gradient)
            # Kept, because parameters that join distant forks run what lies between, with others' forks in it.
            torch.autograd.backward(edges, gradients, retain_graph=True, inputs=parameters)
            for hook in hooks:
                hook.remove()
        self._groups.clear()
        self._arrived.clear()


def _walk(root: Node) -> tuple[dict[Node, list[Node]], list[Any]]:
    """Of the graph under a node: which nodes each one gets gradients from, and the leaves' nodes in a fixed order."""
    users: dict[Node, list[Node]] = defaultdict(list)
    leaves = []
    seen, pending = {root}, [root]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves.append(node)
        for below, _ in node.next_functions:
            if below is None:
                continue
            users[below].append(node)
            if below not in seen:
                seen.add(below)
                pending.append(below)
    return users, leaves


def _reached(start: Node, users: dict[Node, list[Node]], stop: set[Node]) -> tuple[set[Node], set[Node]]:
    """Nodes that lead to `start`: those before any in `stop`, and those in `stop` that are met first."""
    free: set[Node] = set()
    met: set[Node] = set()
    pending = [start]
    while pending:
        for user in users.get(pending.pop(), ()):
            if user in stop:
                met.add(user)
            elif user not in free:
                free.add(user)
                pending.append(user)
    return free, met


def _keep_gathered(model: HybridLM, blocks: bool) -> None:
    """Let what FSDP gathers inside of blocks stay after a forward pass, and on demand the blocks too.

    Other micro-batches go forward between the halves of a backward pass, whose second needs the blocks' weights. And
    selective recomputation cannot gather what its forward pass found gathered by an earlier micro-batch.
    """
    for block in model.layers.values():
        for module in block.modules():
            if isinstance(module, FSDPModule) and (blocks or module is not block):
                module.set_reshard_after_forward(False, recurse=False)


def _device_and_dtype(model: HybridLM, compute_dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where a model is, and the dtype of its products: that of its parameters unless it is narrower."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype if compute_dtype == torch.float32 else compute_dtype


def _local_gradient(model: HybridLM) -> Tensor:
    """This rank's part of the gradient of a stage's embedding matrix."""
    assert model.embed is not None
    gradient = model.embed.weight.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
