"""Ring attention over the context-parallel axis (Liu et al. 2023, arXiv:2310.01889): keys and values travel.

Every rank keeps its queries and passes the block of keys and values that it holds to the next rank, while it attends to
that block; an online softmax joins what the blocks give. Key segments after a query segment cost nothing, which is what
makes zigzag layouts balanced (Brandon et al. 2023, arXiv:2311.09431).

With R ranks, n tokens on the rank that holds most, J key heads and elements of e bytes, a layer sends from each rank

| pass     | messages                                    | bytes                 |
| -------- | ------------------------------------------- | --------------------- |
| forward  | R - 1 with a block's keys and values        | (R - 1) · 2 B J n P e |
| backward | R - 1 with a block's keys and values        | (R - 1) · 2 B J n P e |
|          | R - 1 with their gradients, of w bytes each | (R - 1) · 2 B J n P w |

where w is 8 for float64 and 4 otherwise, as in all sums. A block's gradients are begun by the rank after its owner; the
owner's part stays at home until the last hop brings the others'. For backward a rank keeps its own queries, keys,
values, output and log-sum-exp; at work it holds two travelling blocks and, in backward, four of gradients besides.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ..kernels.numerics import compute_dtype
from .comm import finish, start_messages
from .context import SegmentedContext
from .layout import SequenceLayout

# Scores of a row and head in memory at a time. At most as many queries as keys, or a query's own key might not be among
# those that it meets first, and its softmax would begin with nothing.
TILE_QUERIES, TILE_KEYS = 128, 2048


def ring_attend(q_BHLP: Tensor, k_BJLP: Tensor, v_BJLP: Tensor, seq: SegmentedContext, scale: float) -> Tensor:
    """Causal attention within documents of this rank's queries over the keys of whole rows, `(B, H, L, P)`.

    L counts this rank's tokens; J divides H. Sums are float32, or float64 for float64 inputs, and the output has the
    queries' dtype. Collective over the context-parallel axis, forward and backward.
    """
    return RingAttention.apply(q_BHLP, k_BJLP, v_BJLP, seq, scale)


class RingAttention(torch.autograd.Function):
    """Attention that passes keys and values around once forward, and once more with their gradients backward.

    `apply(q_BHLP, k_BJLP, v_BJLP, seq, scale)` as `ring_attend`. Collective over `seq.group`, both ways.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLP: Tensor, k_BJLP: Tensor, v_BJLP: Tensor, seq: SegmentedContext, scale: float
    ) -> Tensor:
        """R - 1 hops of keys and values."""
        B, J, L, P = k_BJLP.shape
        kv_2BJnP = k_BJLP.new_zeros(2, B, J, seq.layout.most_tokens, P)
        kv_2BJnP[0, :, :, :L] = k_BJLP
        kv_2BJnP[1, :, :, :L] = v_BJLP
        ctx.seq, ctx.scale = seq, scale
        out_BHLP, lse_BHL = _forward(q_BHLP, kv_2BJnP, _document_start(seq, q_BHLP), **_where(seq), scale=scale)
        ctx.save_for_backward(q_BHLP, kv_2BJnP, out_BHLP, lse_BHL)
        return out_BHLP

    @staticmethod
    def backward(ctx: Any, dout_BHLP: Tensor) -> tuple[Tensor | None, ...]:
        """R - 1 hops of keys and values, and R - 1 of their gradients."""
        saved = q_BHLP, kv_2BJnP, _, _ = ctx.saved_tensors
        start_BL = _document_start(ctx.seq, q_BHLP)
        dq_BHLP, dkv_2BJnP = _backward(dout_BHLP, *saved, start_BL, **_where(ctx.seq), scale=ctx.scale)
        dk_BJLP, dv_BJLP = dkv_2BJnP[:, :, :, : q_BHLP.shape[2]].to(kv_2BJnP.dtype)
        return dq_BHLP, dk_BJLP, dv_BJLP, None, None


def _document_start(seq: SegmentedContext, like: Tensor) -> Tensor | None:
    """Index in its row of the first token of each token's document, (1 or B, whole L); None where all are 0."""
    if seq.row_reset_BL is None:
        return None
    index_of = lambda: torch.arange(seq.layout.length, device=like.device)
    return seq.shared("document_start", lambda: index_of() - seq.row_position_BL(like.device))


def _where(seq: SegmentedContext) -> dict[str, Any]:
    """Layout and group, in words that an operator takes."""
    return {
        "owners": list(seq.layout.owners),
        "bounds": list(seq.layout.bounds),
        "group_name": seq.group.group_name,
    }


# Operators, as the kernels are: what recomputation keeps is their output and not the product of every tile, and fake
# tensors are never asked where documents begin.


@torch.library.custom_op("headrace::ring_attention", mutates_args=())
def _forward(
    q_BHLP: Tensor,
    kv_2BJnP: Tensor,
    start_BL: Tensor | None,
    *,
    owners: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    ring = _Ring.named(owners, bounds, group_name, start_BL)
    q_BJhLP = q_BHLP.unflatten(1, (kv_2BJnP.shape[2], -1))
    softmax = _OnlineSoftmax.begin(q_BJhLP)
    for owner, block_2BJnP in ring.travel(kv_2BJnP):
        for tile in ring.tiles(owner):
            k_NKP, v_NKP = tile.of_keys(block_2BJnP)
            softmax.absorb(tile, ring.scores(tile, tile.of_queries(q_BJhLP), k_NKP, scale), v_NKP)
    out_BJhLP, lse_BJhL = softmax.finish()
    return out_BJhLP.to(q_BHLP.dtype).flatten(1, 2), lse_BJhL.flatten(1, 2)


@_forward.register_fake
def _(q_BHLP: Tensor, kv_2BJnP: Tensor, start_BL: Tensor | None, **_where: Any) -> tuple[Tensor, Tensor]:
    return q_BHLP.new_empty(q_BHLP.shape), q_BHLP.new_empty(q_BHLP.shape[:-1], dtype=compute_dtype(q_BHLP))


@torch.library.custom_op("headrace::ring_attention_backward", mutates_args=())
def _backward(
    dout_BHLP: Tensor,
    q_BHLP: Tensor,
    kv_2BJnP: Tensor,
    out_BHLP: Tensor,
    lse_BHL: Tensor,
    start_BL: Tensor | None,
    *,
    owners: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    ring = _Ring.named(owners, bounds, group_name, start_BL)
    dtype = compute_dtype(q_BHLP)
    delta_BHL = (dout_BHLP.to(dtype) * out_BHLP).sum(-1)
    dq_BHLP = torch.zeros(q_BHLP.shape, dtype=dtype, device=q_BHLP.device)
    rows = [x.unflatten(1, (kv_2BJnP.shape[2], -1)) for x in (q_BHLP, dout_BHLP, lse_BHL, delta_BHL, dq_BHLP)]
    home_2BJnP = torch.zeros(kv_2BJnP.shape, dtype=dtype, device=q_BHLP.device)
    works: list[dist.Work] = []
    leaving = arriving = home_2BJnP
    for hop, (owner, block_2BJnP) in enumerate(ring.travel(kv_2BJnP)):
        dblock_2BJnP = home_2BJnP if hop == 0 else torch.zeros_like(home_2BJnP)
        for tile in ring.tiles(owner):
            _add_gradients(ring, tile, [tile.of_queries(x) for x in rows], (block_2BJnP, dblock_2BJnP), scale)
        if hop == 0:
            continue
        finish(works)
        if hop > 1:
            dblock_2BJnP += arriving
        # What leaves is named until it is gone, so that its memory is not used again.
        leaving, arriving = dblock_2BJnP, torch.empty_like(dblock_2BJnP)
        works = ring.pass_on(leaving, arriving)
    finish(works)
    if ring.ranks > 1:
        home_2BJnP += arriving
    return dq_BHLP.to(q_BHLP.dtype), home_2BJnP


@_backward.register_fake
def _(dout_BHLP: Tensor, q_BHLP: Tensor, kv_2BJnP: Tensor, *_rest: Any, **_where: Any) -> tuple[Tensor, Tensor]:
    return q_BHLP.new_empty(q_BHLP.shape), kv_2BJnP.new_empty(kv_2BJnP.shape, dtype=compute_dtype(q_BHLP))


def _add_gradients(
    ring: "_Ring", tile: "_Tile", rows: list[Tensor], blocks: tuple[Tensor, Tensor], scale: float
) -> None:
    """Add a tile's part of `dq`, the last of its queries' `rows`, and of `dk` and `dv`, the second of its `blocks`."""
    q, dout, lse_BJhQ, delta_BJhQ, dq_BJhQP = rows
    (k_NKP, v_NKP), (dk_NKP, dv_NKP) = (tile.of_keys(block) for block in blocks)
    p_BJhQK = ring.scores(tile, q, k_NKP, scale).sub_(lse_BJhQ[..., None]).exp_()
    q_NRP, dout_NRP = _joined(q), _joined(dout)
    dv_NKP += _product(_joined(p_BJhQK).mT, dout_NRP)
    dscores_BJhQK = _product(dout_NRP, v_NKP.mT).view(p_BJhQK.shape)
    dscores_NRK = _joined(dscores_BJhQK.sub_(delta_BJhQ[..., None]).mul_(p_BJhQK).mul_(scale))
    dk_NKP += _product(dscores_NRK.mT, q_NRP)
    dq_BJhQP += _product(dscores_NRK, k_NKP).view(dq_BJhQP.shape)


@dataclass(frozen=True)
class _Tile:
    """Queries and keys that meet in one product: first and last + 1 in the row, and places in what their ranks hold."""

    queries: slice
    keys: slice
    query_place: slice
    key_place: slice
    is_causal: bool
    has_documents: bool

    def of_queries(self, x_BJhL: Tensor) -> Tensor:
        """The tile's part of something this rank has for each of its tokens."""
        return x_BJhL[:, :, :, self.query_place]

    def of_keys(self, block_2BJnP: Tensor) -> tuple[Tensor, Tensor]:
        """The tile's part of a block of keys and values, `(B J, K, P)` each."""
        k_NKP, v_NKP = block_2BJnP[:, :, :, self.key_place].flatten(1, 2)
        return k_NKP, v_NKP


@dataclass(frozen=True)
class _Ring:
    """Who holds which tokens, how blocks go from rank to rank, and which tiles of queries and keys there are."""

    layout: SequenceLayout
    group: dist.ProcessGroup
    start_BL: Tensor | None

    @classmethod
    def named(cls, owners: Sequence[int], bounds: Sequence[int], group_name: str, start_BL: Tensor | None) -> "_Ring":
        """From what `_where` says."""
        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        return cls(SequenceLayout(tuple(owners), tuple(bounds)), group, start_BL)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def pass_on(self, leaving: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Begin to send a block to the next rank and to receive one from the rank before."""
        rank = dist.get_rank(self.group)
        return start_messages([((rank + 1) % self.ranks, leaving)], [((rank - 1) % self.ranks, arriving)], self.group)

    def travel(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every rank's block and whose it is, this rank's first; the next one arrives while the caller works."""
        rank = dist.get_rank(self.group)
        buffers = [torch.empty_like(block) for _ in range(min(2, self.ranks - 1))]
        for hop in range(self.ranks - 1):
            coming = buffers[hop % 2]
            works = self.pass_on(block, coming)
            yield (rank - hop) % self.ranks, block
            finish(works)
            block = coming
        yield (rank + 1) % self.ranks, block

    def tiles(self, owner: int) -> Iterator[_Tile]:
        """Tiles of this rank's queries and of `owner`'s keys that they may see; for each query the latest first."""
        rank = dist.get_rank(self.group)
        for mine in self.layout.of_rank(rank):
            span, place = self.layout.span(mine), self.layout.place(mine)
            earlier = [s for s in reversed(self.layout.of_rank(owner)) if s <= mine]
            for first in range(span.start, span.stop, TILE_QUERIES):
                queries = slice(first, min(first + TILE_QUERIES, span.stop))
                for theirs in earlier:
                    yield from self._tiles(queries, _moved(queries, place.start - span.start), theirs)

    def _tiles(self, queries: slice, query_place: slice, segment: int) -> Iterator[_Tile]:
        """Tiles of a stretch of queries and of the keys of one segment."""
        span, place = self.layout.span(segment), self.layout.place(segment)
        oldest, latest = self._document_starts(queries)
        first, stop = max(span.start, oldest), min(span.stop, queries.stop)
        while first < stop:
            keys = slice(max(first, stop - TILE_KEYS), stop)
            key_place = _moved(keys, place.start - span.start)
            is_causal = keys.stop - 1 > queries.start
            yield _Tile(queries, keys, query_place, key_place, is_causal, latest > keys.start)
            stop = keys.start

    def _document_starts(self, queries: slice) -> tuple[int, int]:
        """First and last of the starts of the queries' documents; on CUDA, which is not to be waited for, bounds."""
        if self.start_BL is None:
            return 0, 0
        if self.start_BL.is_cuda:
            return 0, self.layout.length
        return int(self.start_BL[:, queries.start].min()), int(self.start_BL[:, queries.stop - 1].max())

    def scores(self, tile: _Tile, q_BJhQP: Tensor, k_NKP: Tensor, scale: float) -> Tensor:
        """Scaled products of a tile's queries and keys, minus infinity where a query does not see a key."""
        scores_NRK = _product(_joined(q_BJhQP), k_NKP.mT).mul_(scale)
        scores_BJhQK = scores_NRK.view(*q_BJhQP.shape[:-1], -1)
        key_K = torch.arange(tile.keys.start, tile.keys.stop, device=k_NKP.device)
        if tile.is_causal:
            query_Q = torch.arange(tile.queries.start, tile.queries.stop, device=k_NKP.device)
            scores_BJhQK.masked_fill_(key_K > query_Q[:, None], -math.inf)
        if tile.has_documents:
            assert self.start_BL is not None
            start_BQ = self.start_BL[:, tile.queries]
            scores_BJhQK.masked_fill_((key_K < start_BQ[..., None])[:, None, None], -math.inf)
        return scores_BJhQK


@dataclass(frozen=True)
class _OnlineSoftmax:
    """Weighted values, the sum of the weights and the highest score so far, updated in place (Milakov et al. 2018)."""

    mixed_BJhLP: Tensor
    total_BJhL: Tensor
    top_BJhL: Tensor

    @classmethod
    def begin(cls, q_BJhLP: Tensor) -> "_OnlineSoftmax":
        """The state of queries that have seen no key yet."""
        mixed = torch.zeros(q_BJhLP.shape, dtype=compute_dtype(q_BJhLP), device=q_BJhLP.device)
        return cls(mixed, torch.zeros_like(mixed[..., 0]), torch.full_like(mixed[..., 0], -math.inf))

    def absorb(self, tile: _Tile, scores_BJhQK: Tensor, v_NKP: Tensor) -> None:
        """Add a tile's keys. A query's first tile must show it a key; each one's own tile comes first."""
        mixed, total, top = (tile.of_queries(x) for x in (self.mixed_BJhLP, self.total_BJhL, self.top_BJhL))
        new_top = torch.maximum(top, scores_BJhQK.amax(-1))
        weight_BJhQK = scores_BJhQK.sub_(new_top[..., None]).exp_()
        shrink = top.sub_(new_top).exp_()
        total.mul_(shrink).add_(weight_BJhQK.sum(-1))
        mixed.mul_(shrink[..., None]).add_(_product(_joined(weight_BJhQK), v_NKP).view(mixed.shape))
        top.copy_(new_top)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp of the scores."""
        return self.mixed_BJhLP.div_(self.total_BJhL[..., None]), self.total_BJhL.log_().add_(self.top_BJhL)


def _moved(place: slice, by: int) -> slice:
    return slice(place.start + by, place.stop + by)


def _joined(x_BJhQX: Tensor) -> Tensor:
    """`(B J, h Q, X)`: queries of heads that share keys, one behind the other."""
    return x_BJhQX.flatten(2, 3).flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in the dtype of sums; on CUDA, of operands as narrow as the narrower one."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    wide = compute_dtype(a)
    if a.is_cuda and narrow != wide:
        return torch.bmm(a.to(narrow), b.to(narrow), out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))
