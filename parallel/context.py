"""What a layer is told about its tokens when a row is shared out over the context-parallel axis."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.sequence import SequenceContext, TrainingPass
from .config import ParallelConfig
from .layout import LAYOUTS, SequenceLayout
from .mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentedContext(SequenceContext):
    """A `SequenceContext` whose `reset_BL` covers this rank's tokens; the documents of the whole row are known besides.

    Args:
        layout: which rank holds which segment of a row.
        group: the ranks of the axis.
        config: how states, keys and values travel.
        on_one_machine: whether the ranks of the axis are.
        row_reset_BL: as `reset_BL`, over whole rows; the same on every rank of the axis.
    """

    layout: SequenceLayout
    group: dist.ProcessGroup
    config: ParallelConfig
    on_one_machine: bool = False
    row_reset_BL: Tensor | None = None

    @property
    def rank(self) -> int:
        """This process on the axis."""
        return dist.get_rank(self.group)

    @property
    def segments(self) -> list[int]:
        """This rank's segments, in order."""
        return self.layout.of_rank(self.rank)

    @property
    def one_document(self) -> bool:
        """False: whether causal order says all is asked of each segment (`segment`)."""
        return False

    def row_position_BL(self, device: torch.device) -> Tensor:  # noqa: N802
        """Position of each token of the whole row in its document; (1, L) when all rows are alike."""
        whole = SequenceContext(reset_BL=self.row_reset_BL)
        return self.shared("row_position", lambda: whole.position_BL(self.layout.length, device))

    def position_BL(self, length: int, device: torch.device) -> Tensor:  # noqa: N802
        """Position of each of this rank's tokens in its document."""
        make = lambda: self.layout.take(self.row_position_BL(device), self.rank)
        return self.shared("position", make)

    def segment(self, segment: int, device: torch.device) -> SequenceContext:
        """One of this rank's segments as the last tokens of what is before it in its row."""
        span = self.layout.span(segment)
        plain = self.row_reset_BL is None and span.start == 0
        make = lambda: SegmentContext(positions_BL=self.row_position_BL(device)[:, span], plain=plain)
        return self.shared(("segment", segment), make)

    def remember(self, key: Hashable, exchanged: T) -> T:
        """Keep what was received in this forward pass for its recomputation."""
        return exchanged if self.config.repeat_exchange else self.shared(key, lambda: exchanged)

    def recall(self, key: Hashable) -> Any:
        """What was received in the forward pass that is being recomputed, None in the pass itself."""
        return self._shared.get(key)


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentContext(SequenceContext):
    """One segment of a row, for attention that is given the keys before it.

    Args:
        positions_BL: position of each of its tokens in its document.
        plain: it begins a row of one document, so that plain causal order says all.
    """

    positions_BL: Tensor
    plain: bool

    @property
    def one_document(self) -> bool:
        """Only the beginning of a row has nothing before it."""
        return self.plain

    def position_BL(self, length: int, device: torch.device) -> Tensor:  # noqa: N802
        """Position of each of the segment's tokens in its document."""
        return self.positions_BL


def share_row(
    config: ParallelConfig,
    mesh: Mesh,
    tensors: list[Tensor],
    reset_BL: Tensor | None,
    training: TrainingPass | None = None,
) -> tuple[list[Tensor], SequenceContext]:
    """This rank's part of tensors that hold whole rows `(B, L)`, and the context that says where they lie.

    `tensors`, `reset_BL` and what `training` holds are the same on all ranks of the axis. With one rank and no virtual
    segments, that is all of them and a plain context.
    """
    if config.num_segments == 1:
        return tensors, SequenceContext(reset_BL=reset_BL, training=training)
    layout = LAYOUTS[config.cp_layout](tensors[0].shape[1], config.cp, config.cp_virtual)
    rank = mesh.rank("cp")
    if training is not None:
        training = replace(training, number_BL=layout.take(training.number_BL, rank))
    context = SegmentedContext(
        reset_BL=None if reset_BL is None else layout.take(reset_BL, rank),
        training=training,
        layout=layout,
        group=mesh.group("cp"),
        config=config,
        on_one_machine=mesh.cp_on_one_machine,
        row_reset_BL=reset_BL,
    )
    return [layout.take(tensor, rank) for tensor in tensors], context
