"""The seam `attend` under context parallelism: each segment's queries meet the keys before it, wherever those are."""

import torch
from torch import Tensor

from ..model.mixers import attention
from ..model.sequence import SequenceContext
from .comm import GatherRow
from .context import SegmentedContext
from .halo import halos
from .ring import ring_attend


def attend(
    q_BHLP: Tensor, k_BJSP: Tensor, v_BJSP: Tensor, seq: SequenceContext, *, window: int | None, scale: float
) -> Tensor:
    """Attention of this rank's queries over their rows' keys. Collective over the context-parallel axis.

    A sliding window takes the `window - 1` keys before each segment, point to point. Full attention passes all keys
    around a ring (`cp_attention = "ring"`, see `ring.py`), or gathers them.
    """
    if not isinstance(seq, SegmentedContext):
        return attention.attend(q_BHLP, k_BJSP, v_BJSP, seq, window=window, scale=scale)
    if window is None and seq.config.cp_attention == "ring":
        return ring_attend(q_BHLP, k_BJSP, v_BJSP, seq, scale)
    kv = torch.cat([k_BJSP, v_BJSP], -1)
    before = _windows(kv, seq, window) if window is not None else _rows(kv, seq)
    parts = []
    own = q_BHLP.split(seq.layout.lengths(seq.rank), 2)
    for segment, q, kv_BJS2P in zip(seq.segments, own, before, strict=True):
        k, v = kv_BJS2P.chunk(2, -1)
        parts.append(attention.attend(q, k, v, seq.segment(segment, q.device), window=window, scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _windows(kv: Tensor, seq: SegmentedContext, window: int) -> list[Tensor]:
    """Keys and values of each segment with those that its first query's window reaches back to."""
    before = halos(kv, seq, min(window - 1, seq.layout.length), 2)
    return [
        torch.cat([halo, own], 2) for halo, own in zip(before, kv.split(seq.layout.lengths(seq.rank), 2), strict=True)
    ]


def _rows(kv: Tensor, seq: SegmentedContext) -> list[Tensor]:
    """Keys and values of the whole row up to the end of each segment."""
    row = GatherRow.apply(kv, seq.layout, 2, seq.group)
    return [row[:, :, : seq.layout.span(segment).stop] for segment in seq.segments]
