"""Batches: the same rows for any number of ranks, exact resuming, errors that surface, and a clean end."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace import UserError
from headrace.data import BatchLoader, DataConfig, TokenDataset, TokenRows
from headrace.data.rows import Row


@pytest.fixture(scope="module")
def rows(prepared: Path) -> TokenRows:
    return TokenRows(TokenDataset(prepared), 16, 0)


class CountingRows:
    """Rows that say their number; row 7 cannot be read when `broken`."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.asked = 0

    def row(self, k: int) -> Row:
        self.asked += 1
        if self.broken and k == 7:
            raise UserError("row 7 is damaged; copy it again")
        return Row(np.full(3, k), np.full(3, -k), np.zeros(3, dtype=bool))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(rows: TokenRows, world_size: int) -> None:
    n = 12 // world_size
    loaders = [BatchLoader(rows, batch_rows=n, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(20):
        batches = [next(loader) for loader in loaders]
        assert all(batch.first_row == 12 * step for batch in batches)
        for name in ("tokens", "targets", "reset"):
            joined = torch.cat([getattr(batch, f"{name}_BL") for batch in batches])
            column = {"tokens": 0, "targets": 1, "reset": 2}[name]
            expected = np.stack([rows.row(k)[column] for k in range(12 * step, 12 * step + 12)])
            assert np.array_equal(joined.numpy(), expected)
    for loader in loaders:
        assert loader.next_row == 240
        loader.close()


def test_shapes_and_types(rows: TokenRows) -> None:
    with BatchLoader(rows, batch_rows=4) as loader:
        batch = next(iter(loader))
    assert batch.tokens_BL.shape == batch.targets_BL.shape == batch.reset_BL.shape == (4, 16)
    assert (batch.tokens_BL.dtype, batch.targets_BL.dtype, batch.reset_BL.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    assert batch.tokens_BL.is_pinned() == torch.cuda.is_available()


def test_resuming_is_exact_whatever_was_read_ahead(rows: TokenRows) -> None:
    with BatchLoader(rows, batch_rows=3, rank=1, world_size=2) as loader:
        for _ in range(5):
            next(loader)
        state = loader.next_row
        expected = [next(loader) for _ in range(5)]
    assert state == 30
    with BatchLoader(rows, batch_rows=3, rank=1, world_size=2, start=state, prefetch=1) as resumed:
        for batch in expected:
            again = next(resumed)
            assert again.first_row == batch.first_row
            assert torch.equal(again.tokens_BL, batch.tokens_BL)
            assert torch.equal(again.targets_BL, batch.targets_BL)
            assert torch.equal(again.reset_BL, batch.reset_BL)


def test_no_more_is_read_ahead_than_asked_for() -> None:
    rows = CountingRows()
    with BatchLoader(rows, batch_rows=2, prefetch=3) as loader:  # type: ignore[arg-type]
        time.sleep(0.5)
        assert rows.asked == 2 * (3 + 1), "three in the queue and one in the hand"
        assert next(loader).tokens_BL.tolist() == [[0] * 3, [1] * 3]


def test_an_error_in_the_thread_surfaces_after_the_good_batches() -> None:
    loader = BatchLoader(CountingRows(broken=True), batch_rows=2)  # type: ignore[arg-type]
    for k in (0, 2, 4):
        assert next(loader).first_row == k
    with pytest.raises(UserError, match="row 7 is damaged"):
        next(loader)
    assert loader.next_row == 6
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


def test_closing_ends_the_thread_at_once() -> None:
    before = threading.active_count()
    loader = BatchLoader(CountingRows(), batch_rows=1)  # type: ignore[arg-type]
    next(loader)
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 1
    assert threading.active_count() == before


@pytest.mark.parametrize("options", [{"batch_rows": 0}, {"rank": 2, "world_size": 2}, {"start": -1}, {"prefetch": 0}])
def test_impossible_options(rows: TokenRows, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        BatchLoader(rows, **{"batch_rows": 1, **options})


def test_problems_of_the_data_table() -> None:
    assert DataConfig().problems() == []
    assert len(DataConfig(folder="", seq_len=0, seed=-1, prefetch=0).problems()) == 4
