"""The tokens just before each segment, wherever they are: what a convolution or a sliding window reaches back to."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .comm import Delivery, Piece, SendPieces
from .context import SegmentedContext
from .layout import SequenceLayout


def halo_pieces(layout: SequenceLayout, reach: int) -> list[Piece]:
    """Who sends which tokens to whom, so that every segment gets the `reach` tokens before it, where the row has them.

    A rank's halos lie one behind the other in order of its segments, `reach` tokens each, filled from their ends.
    A short segment passes on nothing by itself: a halo may come in pieces from several segments.
    """
    pieces = []
    place = dict.fromkeys(layout.owners, 0)
    for segment, owner in enumerate(layout.owners):
        start = layout.bounds[segment]
        end_of_halo = place[owner] + reach
        for earlier in range(segment):
            low, high = max(layout.bounds[earlier], start - reach), layout.bounds[earlier + 1]
            if low >= high:
                continue
            own = layout.place(earlier).start - layout.bounds[earlier]
            target = slice(end_of_halo - (start - low), end_of_halo - (start - high))
            pieces.append(Piece(layout.owners[earlier], owner, slice(own + low, own + high), target))
        place[owner] = end_of_halo
    return pieces


def halos(x: Tensor, seq: SegmentedContext, reach: int, dim: int, remember_as: Hashable | None = None) -> list[Tensor]:
    """The `reach` tokens before each of this rank's segments along `dim`, zero where the row has none. Collective.

    Gradients flow back to the ranks that the tokens came from. With `remember_as`, recomputation sends nothing again.
    """
    if reach == 0:
        return [x.narrow(dim, 0, 0)] * len(seq.segments)
    pieces = seq.shared(("halo", reach), lambda: halo_pieces(seq.layout, reach))

    def remember(send: Callable[[], Tensor]) -> Tensor:
        known = seq.recall(remember_as)
        return seq.remember(remember_as, send()) if known is None else known

    keep = Delivery(pieces, len(seq.segments) * reach, dim, seq.group, None if remember_as is None else remember)
    return list(SendPieces.apply(x, keep).split(reach, dim))


def halo_is_cut_off(seq: SegmentedContext, segment: int, reach: int) -> Tensor | None:
    """Which of the `reach` tokens before a segment are of another document than its last, `(B, reach)`, or None."""
    reset_BL = seq.row_reset_BL
    if reset_BL is None:
        return None
    start = seq.layout.bounds[segment]
    there = min(reach, start)

    def make() -> Tensor:
        starts_BK = reset_BL[:, start - there : start]
        # A token is cut off when a document starts after it and before the segment.
        later_BK = starts_BK.flip(1).cumsum(1).flip(1) - starts_BK.long()
        return torch.nn.functional.pad(later_BK > 0, (reach - there, 0), value=True)

    return seq.shared(("cut off", segment, reach), make)
