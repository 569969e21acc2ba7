"""Packing: rows of a fixed number of tokens, cut from the documents of a shard in the order of an epoch."""

from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .dataset import TokenDataset
from .order import WINDOW_SHARDS, LeastRecentlyUsed, RowOrder

IGNORED = -100


class Row(NamedTuple):
    """One row: `tokens_L` and `targets_L` (int64; -100 where there is nothing to predict), `reset_L` (bool)."""

    tokens_L: np.ndarray
    targets_L: np.ndarray
    reset_L: np.ndarray


class TokenRows:
    """Rows of `seq_len` tokens over endless epochs: `row(k)` is a pure function of the data, `seq_len`, `seed` and k.

    In every epoch the documents of a shard are put in a keyed order and joined into one stream; row j of the shard
    takes the inputs [j L, (j+1) L) of the stream, and its targets are one token further. So each token that has a
    predecessor in its document is a target exactly once an epoch; what follows a document's last token (another
    document) is no target. The last row of a shard is filled up with padding. `reset_L` is True where a document, or
    the padding, starts.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int) -> None:
        if seq_len < 1:
            raise UserError(f"seq_len={seq_len} is below 1; use a number of tokens, as 256")
        tokens_per_shard = np.array([shard.num_tokens for shard in dataset.shards], dtype=np.int64)
        if seq_len > tokens_per_shard.max() - 1:
            raise UserError(
                f"seq_len={seq_len} is above the data: the largest shard of {dataset.folder} ({dataset.split}) "
                f"fills rows of at most {tokens_per_shard.max() - 1} tokens; use a smaller seq_len or more text"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        # The last token of a shard is never an input: nothing follows it.
        self.order = RowOrder(-(-(tokens_per_shard - 1) // seq_len), seed=seed)
        self._streams = LeastRecentlyUsed(2 * WINDOW_SHARDS)

    @property
    def rows_per_epoch(self) -> int:
        """How many rows an epoch has."""
        return self.order.rows_per_epoch

    def row(self, k: int) -> Row:
        """Row `k` >= 0 of the endless sequence; UserError where the data was damaged."""
        epoch, shard_number, number = self.order.locate(k)
        shard = self.dataset.shard(shard_number)
        documents, starts = self._streams.get((epoch, shard_number), lambda: self._stream(epoch, shard_number))
        begin = number * self.seq_len
        end = min(begin + self.seq_len + 1, int(starts[-1]))
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        pieces = [
            shard.document(int(documents[i]))[max(0, begin - int(starts[i])) : end - int(starts[i])]
            for i in range(first, last)
        ]
        return self._cut(np.concatenate(pieces).astype(np.int64), starts[first : last + 1] - begin)

    def _stream(self, epoch: int, shard_number: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard's documents in the order of an epoch, and where each starts in the stream (one more: its end)."""
        num_tokens = self.dataset.shard(shard_number).num_tokens
        documents = self.order.document_order(epoch, shard_number, len(num_tokens))
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(num_tokens[documents], out=starts[1:])
        return documents, starts

    def _cut(self, stream: np.ndarray, starts: np.ndarray) -> Row:
        """A row from its stretch of the stream and the document starts in it, relative to the row's first token."""
        length = self.seq_len
        tokens_L = np.full(length, self.dataset.pad_id, dtype=np.int64)
        targets_L = np.full(length, IGNORED, dtype=np.int64)
        reset_L = np.zeros(length, dtype=bool)
        filled = min(length, len(stream))
        tokens_L[:filled] = stream[:filled]
        targets_L[: len(stream) - 1] = stream[1:]
        # Each start but the first of the stretch follows the last token of another document.
        reset_L[starts[(starts >= 0) & (starts < length)]] = True
        targets_L[starts[(starts >= 1) & (starts <= length)] - 1] = IGNORED
        return Row(tokens_L, targets_L, reset_L)
