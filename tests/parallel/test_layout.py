"""Sequence layouts: every token on one rank, in order; halos come from wherever the tokens are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.parallel.halo import halo_pieces
from headrace.parallel.layout import LAYOUTS, SequenceLayout, contiguous, zigzag


@st.composite
def layouts(draw: st.DrawFn) -> SequenceLayout:
    """Any owners, any lengths from one token on."""
    owners = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    lengths = draw(st.lists(st.integers(1, 5), min_size=len(owners), max_size=len(owners)))
    return SequenceLayout(tuple(owners), tuple(sum(lengths[:i]) for i in range(len(owners) + 1)))


@given(layouts())
def test_ranks_share_the_row_out(layout: SequenceLayout) -> None:
    row = torch.arange(layout.length)[None]
    rebuilt = torch.full_like(row, -1)
    for s, owner in enumerate(layout.owners):
        rebuilt[:, layout.span(s)] = layout.take(row, owner)[:, layout.place(s)]
    assert torch.equal(rebuilt, row)
    assert layout.most_tokens == max(sum(layout.lengths(rank)) for rank in layout.owners)
    assert [s for run in layout.runs for s in run] == list(range(len(layout.owners)))
    assert all(layout.owners[a[-1]] != layout.owners[b[0]] for a, b in zip(layout.runs, layout.runs[1:], strict=False))


@pytest.mark.parametrize("name", LAYOUTS)
@given(length=st.integers(40, 90), ranks=st.integers(1, 5), virtual=st.integers(1, 3))
def test_segments_are_even(name: str, length: int, ranks: int, virtual: int) -> None:
    layout = LAYOUTS[name](length, ranks, virtual)
    lengths = [b - a for a, b in zip(layout.bounds, layout.bounds[1:], strict=False)]
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == ranks * virtual * (2 if name == "zigzag" and ranks > 1 else 1)


def test_zigzag_joins_the_two_middle_segments() -> None:
    assert zigzag(16, 4).owners == (0, 1, 2, 3, 3, 2, 1, 0)
    assert [list(run) for run in zigzag(16, 4).runs] == [[0], [1], [2], [3, 4], [5], [6], [7]]
    assert [list(run) for run in contiguous(16, 2, 2).runs] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("bounds", [(0, 3), (0, 3, 3), (1, 2, 3), (0, 4, 2)])
def test_bounds_that_do_not_cut_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not cut a row into 2 segments"):
        SequenceLayout((0, 1), bounds)


@given(layouts(), st.integers(1, 9))
def test_halos_are_the_tokens_before(layout: SequenceLayout, reach: int) -> None:
    row = torch.arange(1, layout.length + 1)
    held = {rank: layout.take(row, rank, 0) for rank in set(layout.owners)}
    got = {rank: torch.zeros(len(layout.of_rank(rank)) * reach, dtype=torch.long) for rank in held}
    for piece in halo_pieces(layout, reach):
        got[piece.receiver][piece.target] += held[piece.sender][piece.source]
    padded = torch.cat([torch.zeros(reach, dtype=torch.long), row])
    for rank, halos in got.items():
        for segment, halo in zip(layout.of_rank(rank), halos.split(reach), strict=True):
            start = layout.bounds[segment]
            assert torch.equal(halo, padded[start : start + reach])
