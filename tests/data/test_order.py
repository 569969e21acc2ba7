"""The order of rows: permutations, coverage, independence."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.order import WINDOW_SHARDS, LeastRecentlyUsed, Permutation, RowOrder, derive_keys


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_a_permutation_takes_every_value_once(size: int, key: int) -> None:
    permutation = Permutation(size, derive_keys("test", key))
    table = permutation.table()
    assert np.array_equal(np.sort(table), np.arange(size))
    for i in range(0, size, max(1, size // 50)):
        assert permutation(i) == table[i]


def test_a_permutation_of_a_huge_domain_stays_inside_and_does_not_repeat() -> None:
    permutation = Permutation(10**15 + 7, derive_keys("test", 1))
    values = [permutation(i) for i in range(2000)]
    assert len(set(values)) == 2000
    assert 0 <= min(values) < 10**13
    assert 10**15 - 10**13 < max(values) < 10**15 + 7


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_all_reached_about_equally(size: int) -> None:
    draws = 100 * len(list(itertools.permutations(range(size))))
    seen = Counter(tuple(Permutation(size, derive_keys("test", i)).table().tolist()) for i in range(draws))
    assert len(seen) == draws // 100
    assert 60 < min(seen.values()) <= max(seen.values()) < 140


def test_a_permutation_leaves_no_trace_of_the_order() -> None:
    table = Permutation(100_000, derive_keys("test", 5)).table()
    assert abs(np.corrcoef(np.arange(100_000), table)[0, 1]) < 0.02
    assert abs(np.corrcoef(table[:-1], table[1:])[0, 1]) < 0.02
    assert np.sum(table == np.arange(100_000)) < 10


def test_out_of_range_is_an_error() -> None:
    permutation = Permutation(10, derive_keys("test"))
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"outside 0\.\.9"):
            permutation(index)
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, derive_keys("test"))
    with pytest.raises(IndexError, match="below 0"):
        RowOrder(np.array([3]), seed=0).locate(-1)
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(np.array([], dtype=np.int64), seed=0)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 9), min_size=1, max_size=200).filter(any), seed=st.integers(0, 2**63 - 1))
def test_every_row_of_every_shard_once_an_epoch(rows: list[int], seed: int) -> None:
    order = RowOrder(np.array(rows), seed=seed)
    expected = {(shard, row) for shard, count in enumerate(rows) for row in range(count)}
    for epoch in (0, 3):
        start = epoch * order.rows_per_epoch
        addresses = [order.locate(k) for k in range(start, start + order.rows_per_epoch)]
        assert all(address.epoch == epoch for address in addresses)
        assert len(addresses) == len(expected)
        assert {(address.shard, address.row) for address in addresses} == expected


def test_no_more_than_a_window_of_shards_is_read_at_a_time() -> None:
    order = RowOrder(np.full(300, 5), seed=3)
    for window in range(300 // WINDOW_SHARDS):
        first = window * WINDOW_SHARDS * 5
        shards = {order.locate(k).shard for k in range(first, first + WINDOW_SHARDS * 5)}
        assert len(shards) == WINDOW_SHARDS


def test_rows_are_mixed_within_a_window_and_differ_by_seed_and_epoch() -> None:
    order, other = RowOrder(np.full(64, 100), seed=0), RowOrder(np.full(64, 100), seed=1)
    first = [order.locate(k) for k in range(64)]
    assert len({address.shard for address in first}) > 30
    again = [order.locate(k + order.rows_per_epoch)[1:] for k in range(64)]
    assert [address[1:] for address in first] != again
    assert first != [other.locate(k) for k in range(64)]
    assert not np.array_equal(order.document_order(0, 0, 50), order.document_order(1, 0, 50))
    assert not np.array_equal(order.document_order(0, 0, 50), order.document_order(0, 1, 50))
    assert not np.array_equal(order.document_order(0, 0, 50), other.document_order(0, 0, 50))


def test_a_row_is_where_it_was_whatever_was_asked_before() -> None:
    rows = np.arange(1, 2000) % 7
    order = RowOrder(rows, seed=9)
    asked = [order.locate(k) for k in np.random.default_rng(0).integers(0, 10**6, 300).tolist()]
    fresh = [RowOrder(rows, seed=9).locate(k) for k in np.random.default_rng(0).integers(0, 10**6, 300).tolist()]
    assert asked == fresh


def test_the_order_does_not_change_between_versions() -> None:
    """A run resumed with a later version must see the same rows: these values are a promise."""
    order = RowOrder(np.array([5, 0, 7, 1, 12]), seed=42)
    assert [tuple(order.locate(k)) for k in (0, 1, 24, 25, 10**12)] == GOLDEN_ADDRESSES
    assert Permutation(10, derive_keys("golden", 7)).table().tolist() == GOLDEN_PERMUTATION


GOLDEN_ADDRESSES = [(0, 2, 5), (0, 0, 2), (0, 4, 9), (1, 0, 1), (40000000000, 4, 1)]
GOLDEN_PERMUTATION = [8, 1, 7, 0, 5, 6, 4, 9, 2, 3]


def test_the_cache_drops_what_was_not_asked_for_longest() -> None:
    cache, made = LeastRecentlyUsed(2), []

    def make(key: str) -> str:
        return cache.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    assert [make(key) for key in "abacb"] == list("abacb")
    assert made == ["a", "b", "c", "b"]
