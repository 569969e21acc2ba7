"""Copies in memory as a run has them: of what they are, when a start takes them, what is told of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ..data import SkippedRows
from ..errors import UserError
from ..parallel.comm import do_together
from .config import Config
from .memory import Identity, Kept, MemoryCopies, describe_pieces, digest_of
from .memory.folder import copies_name
from .metrics import Metrics
from .resume import Facts
from .run_clock import RunClock
from .run_folder import fixed_part
from .source import source_record


def open_memory(
    config: Config, layout: Mapping[str, int], tensors: Mapping[str, torch.Tensor], facts: Facts, clock: RunClock
) -> MemoryCopies | None:
    """The copies in memory of a run; None where they are off. Collective.

    Args:
        config: of the run.
        layout: degrees of the mesh.
        tensors: from `training_tensors`.
        facts: what the run must still be to go on.
        clock: knows the run's id and the number of the start, on rank 0.

    Raises:
        UserError: as `MemoryCopies`.
    """
    settings = config.checkpoint
    if not settings.memory_every_steps:
        return None
    said = [(clock.run_id, clock.start, copies_name(clock.run_id, config.run.folder))]  # as rank 0 sees the folder
    dist.broadcast_object_list(said, src=0)
    common = {
        "world_size": dist.get_world_size(),
        "layout": dict(layout),
        "data": facts.data,
        "optimizer": facts.optimizer,
        "config": digest_of(fixed_part(config)),
        "code": digest_of(source_record()),
    }
    run_id, start, name = said[0]
    identity = Identity(run_id, start, common, describe_pieces(tensors))
    return MemoryCopies(Path(settings.memory_folder), name, tensors, identity, settings.asynchronous)


def search_memory(memory: MemoryCopies | None, config: Config, note: Path) -> Callable[[int], Kept | None] | None:
    """What `resume_training` asks for copies in memory; None where they are off. Collective.

    Args:
        memory: the copies.
        config: of the run.
        note: the file in which the run notes what rows it leaves out: copies from before are not used.

    Raises:
        UserError: the note cannot be read.
    """
    if memory is None:
        return None
    said = [do_together(lambda: _rewinds(note) if dist.get_rank() == 0 else 0)]
    dist.broadcast_object_list(said, src=0)
    return lambda later_than: memory.load(later_than, config.train.steps, said[0])


def tell_resumed(memory: MemoryCopies | None, metrics: Metrics | None, clock: RunClock) -> None:
    """Say where the run goes on from, where that is memory; on rank 0."""
    if memory is not None and memory.kept is not None and metrics is not None:
        metrics.memory_resume(memory.kept.step, memory.kept.from_peers)
        clock.tell("memory_resume", {"step": memory.kept.step, "from_peers": memory.kept.from_peers})


def report_copies(memory: MemoryCopies, metrics: Metrics | None) -> None:
    """Write records of the copies that are done or were given up since the last call."""
    for job in memory.poll():
        if metrics is None:
            continue
        if job.failure:
            metrics.memory_failed(job.moment.step, job.failure)
        else:
            seconds = {"blocked_s": job.blocked_s, "background_s": job.background_s}
            metrics.memory({"step": job.moment.step, "bytes": memory.num_bytes, **seconds})


def _rewinds(note: Path) -> int:
    if not note.exists():
        return 0
    try:
        return len(SkippedRows.read(json.loads(note.read_text())).stretches)
    except (ValueError, UserError) as error:
        raise UserError(f"{note} is damaged ({error}); remove it to train on rows noted since the checkpoint") from None
