"""The order of rows: a pure function of a seed and a global row number, without a list in memory.

A keyed permutation of 0..n-1 needs no table: a Feistel network permutes a power of four at least as large as n, and
walking along its cycle until a value below n comes up makes it a permutation of 0..n-1 (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002, "cycle-walking").
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 4
WINDOW_SHARDS = 64
_FEW = 64
_MASK_64 = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def derive_keys(*parts: int | str) -> tuple[int, ...]:
    """Round keys (64 bits each) for a purpose named by `parts`, such as ("rows", seed, epoch, window)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


class Permutation:
    """A keyed permutation of 0..size-1: `p(i)` for one value in constant memory, `p.table()` for all of them."""

    def __init__(self, size: int, keys: tuple[int, ...]) -> None:
        if size < 1:
            raise ValueError(f"size={size}; a permutation needs at least one value")
        self.size = size
        self.keys = keys
        # Four bits a half at the least: smaller networks reach the permutations of a few values unequally often.
        self.half_bits = max(4, ((size - 1).bit_length() + 1) // 2)
        self.half_mask = (1 << self.half_bits) - 1

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        value = index
        while True:
            value = self._encrypt(value)
            if value < self.size:
                return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self.half_bits, value & self.half_mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & self.half_mask)
        return left << self.half_bits | right

    def table(self) -> np.ndarray:
        """All values, `table()[i] == p(i)`, int64 of shape (size,)."""
        if self.size < _FEW:
            return np.array([self(i) for i in range(self.size)], dtype=np.int64)
        result = np.arange(self.size, dtype=np.uint64)
        walking = np.arange(self.size)
        while walking.size:
            result[walking] = self._encrypt_array(result[walking])
            walking = walking[result[walking] >= self.size]
        return result.astype(np.int64)

    def _encrypt_array(self, values: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self.half_bits), np.uint64(self.half_mask)
        left, right = values >> bits, values & mask
        for key in self.keys:
            left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
        return left << bits | right


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `value`."""
    value = (value ^ (value >> 30)) * _MULTIPLIERS[0] & _MASK_64
    value = (value ^ (value >> 27)) * _MULTIPLIERS[1] & _MASK_64
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return values ^ (values >> np.uint64(31))


class LeastRecentlyUsed:
    """A bounded cache for several threads: the entry not asked for longest is dropped when `size` is passed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The entry of `key`, made by `make()` when it is not there."""
        with self._lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
            entry = self.entries[key] = make()
            if len(self.entries) > self.size:
                self.entries.popitem(last=False)
            return entry


class RowAddress(NamedTuple):
    """Where a row is: the `epoch`, the `shard`, and the number of the `row` in that shard's stream of the epoch."""

    epoch: int
    shard: int
    row: int


class RowOrder:
    """The address of every global row number k, given how many rows each shard holds.

    An epoch visits the shards in a keyed order, 64 at a time (a window), and the rows of a window in a keyed order:
    no more than 64 shards are being read at any time, and no order is ever stored or exchanged.
    """

    def __init__(self, rows_per_shard: np.ndarray, *, seed: int) -> None:
        self.rows_per_shard = np.asarray(rows_per_shard, dtype=np.int64)
        self.rows_per_epoch = int(self.rows_per_shard.sum())
        if self.rows_per_epoch < 1:
            raise ValueError("there are no rows to put in order")
        self.seed = seed
        self._epochs = LeastRecentlyUsed(4)
        self._windows = LeastRecentlyUsed(16)

    def locate(self, k: int) -> RowAddress:
        """The address of global row `k` >= 0. Cost: two binary searches and one keyed permutation."""
        if k < 0:
            raise IndexError(f"row {k} is below 0")
        epoch, place = divmod(k, self.rows_per_epoch)
        shards, row_ends = self._epochs.get(epoch, lambda: self._epoch(epoch))
        position = int(np.searchsorted(row_ends, place, side="right"))
        window = position // WINDOW_SHARDS
        first = window * WINDOW_SHARDS
        before = int(row_ends[first - 1]) if first else 0
        last = min(first + WINDOW_SHARDS, len(shards)) - 1
        permutation = self._windows.get(
            (epoch, window),
            lambda: Permutation(int(row_ends[last]) - before, derive_keys("rows", self.seed, epoch, window)),
        )
        place = before + permutation(place - before)
        position = int(np.searchsorted(row_ends, place, side="right"))
        start = int(row_ends[position - 1]) if position else 0
        return RowAddress(epoch, int(shards[position]), place - start)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and how many rows lie before the end of each."""
        shards = Permutation(len(self.rows_per_shard), derive_keys("shards", self.seed, epoch)).table()
        return shards, np.cumsum(self.rows_per_shard[shards])

    def document_order(self, epoch: int, shard: int, num_documents: int) -> np.ndarray:
        """The order of a shard's documents in an epoch, int64 of shape (num_documents,)."""
        return Permutation(num_documents, derive_keys("documents", self.seed, epoch, shard)).table()
