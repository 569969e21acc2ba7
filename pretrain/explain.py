"""What a run will hold and send, found by building it and taking one step of it with fake tensors in a fake world."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data import Batch
from ..errors import UserError
from ..model.config import ModelConfig
from ..model.rules import ShardRule
from ..parallel.dry_run import FakeWorld, fake_world, passes_of_step, plan_even_trip
from ..parallel.experts import set_expert_seams
from ..parallel.layout import LAYOUTS
from ..parallel.mesh import Mesh
from ..parallel.pipeline import Pipeline
from ..parallel.spread import spread_model
from ..parallel.stages import cut_stages, stages_of_rank
from ..parallel.tensor import sum_replicated_gradients
from ..parallel.traffic import Sent, Traffic
from .build import build_stage, compute_dtype
from .config import Config
from .engine import Engine
from .optimizers.build import build_optimizers
from .optimizers.sharded import Optimizer, local_part
from .optimizers.size import state_size


@dataclass(frozen=True)
class Held:
    """One parameter as a rank holds it.

    Attributes:
        name: in the whole model.
        shape: of the whole.
        placement: how it lies on each axis, in words.
        local_shape: of the rank's part.
        parameter_bytes: of the rank's part.
        gradient_bytes: of the largest gradient that a rank keeps between passes: until the last micro-batch FSDP adds
            gradients up before it shares them out.
        optimizer_bytes: of what the optimizer keeps for the rank's part, and of averaged weights where there are any.
    """

    name: str
    shape: tuple[int, ...]
    placement: str
    local_shape: tuple[int, ...]
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Explanation:
    """What one rank of a run holds and sends in one update.

    Attributes:
        degrees: of each axis.
        coordinates: this rank's place on each axis.
        layers: numbers of the layers it holds.
        tokens: stretches of each row that it works on.
        rows, micro_batches: of one update, on this rank.
        precision: matrices are multiplied in, where this machine's devices are those of the run.
        experts: numbers of the experts of each layer that this rank computes; empty where the model has none.
        expert_shard: ranks that hold these same experts and shard them among themselves.
        held: its parameters.
        optimizer_bytes: of the same for the whole model, each parameter counted once.
        sent: each collective and message with how often it occurs.
    """

    config: Config
    world_size: int
    rank: int
    degrees: dict[str, int]
    coordinates: dict[str, int]
    layers: list[int]
    tokens: list[range]
    rows: int
    micro_batches: int
    precision: str
    experts: range
    expert_shard: int
    held: list[Held]
    optimizer_bytes: int
    sent: Counter[Sent]


def default_world(config: Config) -> int:
    """The least number of processes that a configuration's degrees ask for."""
    parallel = config.parallel
    # `ep` is carved out of other axes; dp_shard=0 stands for as many as that takes.
    spread = parallel.cp * (parallel.tp if parallel.ep_over_tp else 1)
    return parallel.model_ranks * parallel.dp_replicate * (parallel.dp_shard or parallel.ep // gcd(parallel.ep, spread))


def explain(config: Config, world_size: int, rank: int) -> Explanation:
    """What rank `rank` of `world_size` holds and sends. The configuration must have no problems for that many.

    Raises:
        UserError: there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise UserError(f"--rank={rank} must be between 0 and {world_size - 1}")
    # Compiled blocks send what plain ones do.
    config = replace(config, train=replace(config.train, compile=False))
    rows = config.train.batch_rows // config.parallel.data_ranks(world_size)
    micro_rows = config.train.micro_batch_rows or rows
    with fake_world(config.parallel, rank, world_size) as fake:
        mesh, engine = fake.mesh, _build_engine(config, fake)
        with fake.tensors():
            optimizers = build_optimizers(engine.models, config.optimizer)
        held = [*_held(engine, optimizers, rows > micro_rows)]
        if config.parallel.pp > 1:
            sent = Counter(_whole_step(engine, optimizers, rows, fake))
        else:
            sent = _short_passes(config, rows, fake) + Counter(_update(engine, optimizers, fake))
        return Explanation(
            config,
            world_size,
            rank,
            degrees=mesh.degrees,
            coordinates={axis: mesh.rank(axis) for axis in mesh.degrees},
            layers=[int(number) for model in engine.models for number in model.layers],
            tokens=_tokens(config, mesh),
            rows=rows,
            micro_batches=-(-rows // micro_rows),
            precision=str(_dtype(config)).removeprefix("torch."),
            experts=_experts(config.model, mesh),
            expert_shard=1 if mesh.experts is None else mesh.size("expert_shard"),
            held=held,
            optimizer_bytes=_whole_state(config, fake),
            sent=sent,
        )


def _dtype(config: Config) -> torch.dtype:
    """What a run on this machine's devices computes in; the dry run itself is on the CPU."""
    return compute_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _build_engine(config: Config, fake: FakeWorld) -> Engine:
    """As `run.build_engine`, but for initial values, which would take most of the time."""
    mesh, parallel, dtype = fake.mesh, config.parallel, _dtype(config)
    cuts = cut_stages(config.model, parallel.num_stages, config.data.seq_len)
    mine = stages_of_rank(parallel, mesh.rank("pp"))
    models = []
    for stage in mine:
        models.append(build_stage(config, cuts[stage]))
        spread_model(models[-1], mesh, parallel, compute_dtype=dtype, recompute=config.train.recompute)
        set_expert_seams(models[-1], mesh, parallel, plan=partial(plan_even_trip, config=config.model.moe))
    with fake.tensors():
        for model in models:
            model.to_empty(device=fake.world.device)
        stages = list(zip(mine, models, strict=True))
        pipeline = Pipeline(stages, mesh, parallel, compute_dtype=dtype) if parallel.pp > 1 else None
    return Engine(config, fake.world, mesh, models, pipeline)


def _whole_step(engine: Engine, optimizers: list[Optimizer], rows: int, fake: FakeWorld) -> list[Sent]:
    with fake.tensors(), Traffic(engine.mesh, engine.models) as traffic:
        engine.forward_backward(_fake_batch(rows, engine.config.data.seq_len))
        _finish_update(engine, optimizers)
    return traffic.sent


def _update(engine: Engine, optimizers: list[Optimizer], fake: FakeWorld) -> list[Sent]:
    """What is sent between the last backward pass and the next step."""
    with fake.tensors(), Traffic(engine.mesh) as traffic:
        for parameter in engine.named_parameters().values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        for model in engine.models:
            sum_replicated_gradients(model, engine.mesh)
        _finish_update(engine, optimizers)
    return traffic.sent


def _finish_update(engine: Engine, optimizers: list[Optimizer]) -> None:
    engine.clip_gradients(engine.config.train.clip_norm)
    skip = torch.zeros((), device=engine.device)
    for optimizer in optimizers:
        optimizer.step(1.0, skip)
    engine.routing.finish_step(engine.models, skip)


def _short_passes(config: Config, rows: int, fake: FakeWorld) -> Counter[Sent]:
    """What the passes of a step send, from a model with one layer of each kind and a step of two micro-batches.

    Layers of a kind send alike, and so do micro-batches before the last.
    """
    micro_rows = config.train.micro_batch_rows or rows
    count = -(-rows // micro_rows)
    last = rows - (count - 1) * micro_rows
    engine = _build_engine(replace(config, model=_one_of_each_kind(config)), fake)
    with fake.tensors(), Traffic(fake.mesh, engine.models) as traffic:
        engine.forward_backward(_fake_batch(last if count == 1 else micro_rows + last, config.data.seq_len))
    end = max((i + 1 for i, entry in enumerate(traffic.sent) if entry.phase != "between"), default=0)
    kinds = engine.models[0].config.kinds
    layers: dict[str, list[int]] = {f"layers.{i}": [] for i in range(len(kinds))}
    for number, kind in enumerate(config.model.kinds):
        layers[f"layers.{kinds.index(kind)}"].append(number)
    total: Counter[Sent] = Counter()
    for entry, times in passes_of_step(traffic.sent[:end], count).items():
        for block in [f"layers.{number}" for number in layers.get(entry.block, [])] or [entry.block]:
            total[replace(entry, block=block)] += times
    return total


def _one_of_each_kind(config: Config) -> ModelConfig:
    """One layer of each kind, and in one chunk: what is computed in how many pieces changes nothing that is sent."""
    kinds = dict.fromkeys(config.model.kinds)
    tables: dict[str, Any] = {}
    for kind in kinds:
        options = getattr(config.model, kind)
        if "chunk_size" in (field.name for field in fields(options)):
            tables[kind] = replace(options, chunk_size=config.data.seq_len)
    return replace(config.model, pattern=" ".join(kinds), **tables)


def _fake_batch(rows: int, length: int) -> Batch:
    tokens_BL = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(tokens_BL, tokens_BL, torch.zeros(rows, length, dtype=torch.bool), 0)


def _experts(model: ModelConfig, mesh: Mesh) -> range:
    if "moe" not in model.kinds:
        return range(0)
    own, rank = model.moe.num_experts // mesh.size("ep"), 0 if mesh.experts is None else mesh.rank("ep")
    return range(rank * own, (rank + 1) * own)


def _held(engine: Engine, optimizers: list[Optimizer], several_passes: bool) -> Iterator[Held]:
    """Every parameter of a rank's models."""
    averaged = 4 if engine.config.train.average_decay else 0
    kept: Counter[str] = Counter()
    for optimizer in optimizers:
        for slot, tensor in optimizer.state().items():
            kept[slot.partition(".")[2]] += local_part(tensor).nbytes
    for model in engine.models:
        rules = model.shard_rules()
        for name, parameter in model.named_parameters():
            local = local_part(parameter)
            gradient = local.nbytes * parameter.requires_grad
            yield Held(
                name,
                tuple(parameter.shape),
                _placement(parameter, rules[name]),
                tuple(local.shape),
                local.nbytes,
                gradient * (_sharded_over(parameter) if several_passes else 1),
                kept[name] + averaged * local.numel(),
            )


def _whole_state(config: Config, fake: FakeWorld) -> int:
    """Bytes of the optimizer's state in one process that holds the whole model."""
    with fake.tensors():
        model = build_stage(config, None, str(fake.world.device))
        averaged = 4 * config.model.num_params() if config.train.average_decay else 0
        return state_size(build_optimizers([model], config.optimizer)).whole + averaged


def _sharded_over(parameter: Tensor) -> int:
    """Ranks over which FSDP shards a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    degrees = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    return degrees.get("fsdp", 1) * degrees.get("expert_shard", 1)


def _placement(parameter: Tensor, rule: ShardRule) -> str:
    """How a parameter lies on the axes that have more than one rank."""
    if not isinstance(parameter, DTensor):
        return "whole"
    words = []
    mesh = parameter.device_mesh
    for axis, ranks, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
        if ranks == 1:
            continue
        if not placement.is_replicate():
            words.append(f"{axis}: Shard({placement.dim})")  # type: ignore[attr-defined]
        elif axis == "tp" and rule.dim is not None:
            words.append(f"{axis}: copied ({rule.unit}={rule.count})")
        else:
            words.append(f"{axis}: Replicate")
    return ", ".join(words) or "whole"


def _tokens(config: Config, mesh: Mesh) -> list[range]:
    """Stretches of every row that this rank works on, those that touch joined."""
    parallel = config.parallel
    layout = LAYOUTS[parallel.cp_layout](config.data.seq_len, parallel.cp, parallel.cp_virtual)
    found: list[range] = []
    for segment in layout.of_rank(mesh.rank("cp")):
        span = layout.span(segment)
        if found and found[-1].stop == span.start:
            found[-1] = range(found[-1].start, span.stop)
        else:
            found.append(range(span.start, span.stop))
    return found
