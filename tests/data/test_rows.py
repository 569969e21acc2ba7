"""Packing: every token a target exactly once, nothing across documents, and the same row always."""

import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import UserError
from headrace.data import TokenDataset, TokenRows
from headrace.data.order import WINDOW_SHARDS
from headrace.data.rows import IGNORED
from headrace.data.shards import ShardEntry

PAD = 0


def unique_documents(lengths: list[int]) -> list[list[int]]:
    """Documents in which no token occurs twice, so that every token can be followed through the packing."""
    ends = np.cumsum([1, *lengths]).tolist()
    return [list(range(start, end)) for start, end in pairwise(ends)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.just(2), st.integers(1, 70)), min_size=1, max_size=40).filter(lambda x: max(x) > 1),
    seq_len=st.one_of(st.just(1), st.integers(1, 90)),
    max_bytes=st.sampled_from([1, 4096, 1 << 20]),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 2),
)
def test_every_token_is_a_target_once_an_epoch(
    lengths: list[int],
    seq_len: int,
    max_bytes: int,
    seed: int,
    epoch: int,
    write_documents: Callable[..., TokenDataset],
) -> None:
    documents = unique_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_documents(Path(folder), documents, max_bytes=max_bytes, vocab_size=1 << 17)
        seq_len = min(seq_len, max(shard.num_tokens for shard in dataset.shards) - 1)
        rows = TokenRows(dataset, seq_len, seed)
        seen: Counter[tuple[int, int]] = Counter()
        first_tokens = {document[0] for document in documents}
        for k in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            tokens_L, targets_L, reset_L = rows.row(k)
            assert tokens_L.shape == targets_L.shape == reset_L.shape == (seq_len,)
            assert (tokens_L.dtype, targets_L.dtype, reset_L.dtype) == (np.int64, np.int64, np.bool_)
            real = tokens_L != PAD
            assert real[0]
            assert not np.any(np.diff(real.astype(int)) > 0)
            padding_start = np.diff(real.astype(int), prepend=1) < 0
            assert np.array_equal(reset_L, np.isin(tokens_L, list(first_tokens)) | padding_start)
            predicted = targets_L != IGNORED
            assert not np.any(predicted & ~real)
            # Inside a row the target is the next input, unless that one belongs to something else.
            assert np.array_equal(predicted[:-1], ~reset_L[1:] & real[1:])
            assert np.array_equal(targets_L[:-1][predicted[:-1]], tokens_L[1:][predicted[:-1]])
            seen.update(zip(tokens_L[predicted].tolist(), targets_L[predicted].tolist(), strict=True))
        expected = [pair for document in documents for pair in pairwise(document)]
        assert seen == Counter(expected)


def test_a_row_is_a_pure_function_of_the_seed_and_its_number(prepared: Path) -> None:
    def read(seed: int, numbers: list[int]) -> dict[int, bytes]:
        rows = TokenRows(TokenDataset(prepared), 32, seed)
        return {k: b"".join(column.tobytes() for column in rows.row(k)) for k in numbers}

    numbers = [0, 1, 700, 5, 10**9, 3]
    assert read(7, numbers) == read(7, numbers[::-1])
    assert read(7, [3]) == {3: read(7, numbers)[3]}
    assert read(7, numbers) != read(8, numbers)


def test_epochs_have_different_rows(prepared: Path) -> None:
    rows = TokenRows(TokenDataset(prepared), 32, 0)
    first = {rows.row(k).tokens_L.tobytes() for k in range(rows.rows_per_epoch)}
    second = {rows.row(k + rows.rows_per_epoch).tokens_L.tobytes() for k in range(rows.rows_per_epoch)}
    assert len(first & second) < len(first) / 2


def test_a_row_does_not_change_between_versions(write_documents: Callable[..., TokenDataset], tmp_path: Path) -> None:
    """A run resumed with a later version must see the same rows: these values are a promise."""
    documents = unique_documents([3, 9, 2, 14, 5])
    rows = TokenRows(write_documents(tmp_path, documents, max_bytes=1 << 20, vocab_size=100), 8, 1234)
    assert [rows.row(k).tokens_L.tolist() for k in (0, 1, 10**6)] == GOLDEN_ROWS


GOLDEN_ROWS = [[4, 5, 6, 7, 8, 9, 10, 11], [12, 29, 30, 31, 32, 33, 15, 16], [28, 29, 30, 31, 32, 33, 13, 14]]


class CountedDataset:
    """30,000 shards of which nothing exists: only what is asked for is counted."""

    def __init__(self, num_shards: int) -> None:
        entry = {"name": "00000.tar", "size": 0, "blake2b": "", "index_size": 0, "index_blake2b": "", "text_bytes": 0}
        self.shards = [ShardEntry(num_documents=10, num_tokens=1000, **entry)] * num_shards  # type: ignore[arg-type]
        self.pad_id = PAD
        self.opened: list[int] = []
        self.num_tokens = np.full(10, 100)

    def shard(self, number: int) -> "CountedDataset":
        if number not in self.opened:
            self.opened.append(number)
        return self

    def document(self, place: int) -> np.ndarray:
        return np.arange(100) + 100 * place


def test_a_cold_start_far_in_opens_one_index() -> None:
    for k in (0, 9 * 10**8):
        dataset = CountedDataset(30_000)
        rows = TokenRows(dataset, 64, 0)  # type: ignore[arg-type]
        rows.row(k)
        assert len(dataset.opened) == 1
    dataset.opened.clear()
    for k in range(WINDOW_SHARDS * 16):
        rows.row(k)
    assert len(dataset.opened) == WINDOW_SHARDS


def test_what_cannot_be_packed(write_documents: Callable[..., TokenDataset], tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[1, 5, 6, 2]], max_bytes=1, vocab_size=10)
    assert TokenRows(dataset, 3, 0).row(0).targets_L.tolist() == [5, 6, 2]
    with pytest.raises(UserError, match=r"seq_len=4 is above the data.*at most 3 tokens; use a smaller seq_len"):
        TokenRows(dataset, 4, 0)
    with pytest.raises(UserError, match="seq_len=0 is below 1"):
        TokenRows(dataset, 0, 0)


def test_an_empty_split_is_refused(write_documents: Callable[..., TokenDataset], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no train documents; prepare"):
        write_documents(tmp_path, [], max_bytes=1, vocab_size=10)
