"""Collectives that the rest of the package calls by meaning, not by name; those on activations have gradients.

Tensor-parallel ranks share tokens out in stretches of `ceil(T / ranks)`, the last ones shorter or empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..errors import MachineError, UserError, is_machines
from .layout import SequenceLayout

T = TypeVar("T")

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all processes, in place. Collective, no host synchronisation."""
    dist.all_reduce(values)
    return values


def largest_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum of `values` over all processes, in place. Collective, no host synchronisation."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def largest_of_each(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """The elementwise maximum of each of `tensors` over `group`, in place, by one message. Collective."""
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
    for tensor, largest in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(largest.view(tensor.shape))


def do_together(action: Callable[[], T]) -> T:
    """`action()` on every process; what any of them met is raised on all, so that none waits for one that left.

    Collective. `action` itself must not be, unless it fails on every process or on none.

    Raises:
        UserError: the message of the lowest rank that met one, or could not read or write a file.
        MachineError: the same, where that was one or its disk failed.
    """
    error: Exception | None = None
    try:
        result = action()
    except (UserError, OSError) as met:
        error = met
    met_by_rank: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(met_by_rank, (str(error), is_machines(error)) if error else None)
    if first := next(filter(None, met_by_rank), None):
        kind = MachineError if first[1] else UserError
        raise kind(first[0], everywhere=True) from error
    return result


def gather_stack(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's `(n, ...)` stack, joined along the first dim in rank order. Collective over `group`."""
    joined = mine.new_empty(mine.shape[0] * dist.get_world_size(group), *mine.shape[1:])
    _all_gather(joined, mine.contiguous(), group=group)
    return joined


def token_share(num_tokens: int, group: dist.ProcessGroup) -> slice:
    """Which of `num_tokens` tokens this rank of a tensor-parallel group holds."""
    share = -(-num_tokens // dist.get_world_size(group))
    start = min(dist.get_rank(group) * share, num_tokens)
    return slice(start, min(start + share, num_tokens))


def _gather_tokens(x_tD: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    share = -(-num_tokens // ranks)
    if len(x_tD) < share:
        x_tD = F.pad(x_tD, (0, 0, 0, share - len(x_tD)))
    return gather_stack(x_tD, group)[:num_tokens]


def _start_scatter(partial_TD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Begin to sum `partial_TD` over ranks; after the work is done, this rank's tokens are in the tensor returned."""
    ranks, num_tokens = dist.get_world_size(group), len(partial_TD)
    share = -(-num_tokens // ranks)
    if num_tokens < share * ranks:
        partial_TD = F.pad(partial_TD, (0, 0, 0, share * ranks - num_tokens))
    mine_tD = partial_TD.new_empty(share, partial_TD.shape[1])
    work = _reduce_scatter(mine_tD, partial_TD.contiguous(), group=group, async_op=True)
    place = token_share(num_tokens, group)
    return mine_tD[: place.stop - place.start], work


def _scatter_tokens(partial_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    mine_tD, work = _start_scatter(partial_TD, group)
    work.wait()
    return mine_tD


class GatherTokens(torch.autograd.Function):
    """Every rank's tokens joined, `(t, D)` to `(T, D)`; backward sums the gradients over ranks and shares them out.

    `apply(x_tD, num_tokens, group)`. Collective over `group`, both ways.
    """

    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        """One all-gather."""
        ctx.group = group
        return _gather_tokens(x_tD, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, None]:
        """One reduce-scatter."""
        return _scatter_tokens(dx_TD, ctx.group), None, None


class ScatterTokens(torch.autograd.Function):
    """Partial results of all tokens summed over ranks and shared out, `(T, D)` to `(t, D)`; backward gathers.

    `apply(partial_TD, group)`. Collective over `group`, both ways.
    """

    @staticmethod
    def forward(ctx: Any, partial_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        """One reduce-scatter."""
        ctx.group, ctx.num_tokens = group, len(partial_TD)
        return _scatter_tokens(partial_TD, group)

    @staticmethod
    def backward(ctx: Any, dy_tD: Tensor) -> tuple[Tensor, None]:
        """One all-gather."""
        return _gather_tokens(dy_tD, ctx.num_tokens, ctx.group), None


class SumPartial(torch.autograd.Function):
    """Partial results of all tokens summed over ranks, whole on each; backward sums the gradients over ranks.

    `apply(partial, group)`. Each rank's gradient is that of its own use of the sum. Collective over `group`, both ways.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        """One all-reduce."""
        ctx.group = group
        return _summed(partial, group)

    @staticmethod
    def backward(ctx: Any, dsum: Tensor) -> tuple[Tensor, None]:
        """One all-reduce."""
        return _summed(dsum, ctx.group), None


def _summed(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole


class GatherLinear(torch.autograd.Function):
    """Several linear maps of gathered tokens: one all-gather forward, one reduce-scatter backward.

    `apply(x_tD, num_tokens, group, *weights_FD)` returns one `(T, F)` for each weight. In backward the weights'
    gradients are computed while the tokens' gradients travel (Korthikanti et al. 2022, arXiv:2205.05198, 4.2.2). Unlike
    there, the gathered tokens are kept for backward instead of gathered again: T D elements, fewer collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, x_tD: Tensor, num_tokens: int, group: dist.ProcessGroup, *weights_FD: Tensor
    ) -> tuple[Tensor, ...]:
        """Gather, then multiply."""
        x_TD = _gather_tokens(x_tD, num_tokens, group)
        ctx.group = group
        ctx.save_for_backward(x_TD, *weights_FD)
        return tuple(x_TD @ weight_FD.t() for weight_FD in weights_FD)

    @staticmethod
    def backward(ctx: Any, *douts_TF: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply, send, and multiply again while it travels."""
        x_TD, *weights_FD = ctx.saved_tensors
        dx_TD = douts_TF[0] @ weights_FD[0]
        for dout_TF, weight_FD in zip(douts_TF[1:], weights_FD[1:], strict=True):
            dx_TD.addmm_(dout_TF, weight_FD)
        dx_tD, work = _start_scatter(dx_TD, ctx.group)
        dweights = [dout_TF.t() @ x_TD for dout_TF in douts_TF]
        work.wait()
        return dx_tD, None, None, *dweights


Message = tuple[int, Tensor]


def start_messages(sends: list[Message], receives: list[Message], group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send tensors to ranks of `group` and to receive others into place; wait for all the works returned.

    Between two ranks messages arrive in the order in which they are sent, so both sides must list them alike.
    """
    works = [dist.P2POp(dist.isend, tensor.contiguous(), group=group, group_peer=peer) for peer, tensor in sends]
    works += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in receives]
    return dist.batch_isend_irecv(works) if works else []


def finish(works: list[dist.Work]) -> None:
    """Wait until messages have been sent and received."""
    for work in works:
        work.wait()


@dataclass(frozen=True)
class Piece:
    """A stretch of tokens that one rank has and another needs: places in the tokens that each of them holds."""

    sender: int
    receiver: int
    source: slice
    target: slice


@dataclass(frozen=True)
class Delivery:
    """Pieces that go from rank to rank, the same list on all.

    Args:
        pieces: who sends what to whom; those of a rank to itself are not messages.
        length: tokens that this rank gets, zero where no piece fills them.
        dim: the tensor dimension along which tokens lie.
        group: the ranks that `pieces` number.
        remember: keeps what is received, or returns it instead of sending again.
    """

    pieces: list[Piece]
    length: int
    dim: int
    group: dist.ProcessGroup
    remember: Callable[[Callable[[], Tensor]], Tensor] | None = None


class SendPieces(torch.autograd.Function):
    """Stretches of tokens from where they are to where they are needed; backward sends the gradients back.

    `apply(x, delivery)`, point to point. Collective over the ranks named in the pieces, both ways.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delivery: Delivery) -> Tensor:
        """One message for each piece that changes ranks."""
        ctx.delivery, ctx.length = delivery, x.shape[delivery.dim]
        send = lambda: _send_pieces(x, delivery.pieces, delivery.length, delivery)
        return send() if delivery.remember is None else delivery.remember(send).detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        """The same messages the other way; a token sent to several places gets all their gradients."""
        back = [Piece(p.receiver, p.sender, p.target, p.source) for p in ctx.delivery.pieces]
        return _send_pieces(dout, back, ctx.length, ctx.delivery), None


def _send_pieces(x: Tensor, pieces: list[Piece], length: int, delivery: Delivery) -> Tensor:
    dim, group = delivery.dim, delivery.group
    rank = dist.get_rank(group)
    sends, receives, arrivals = [], [], []
    for piece in pieces:
        if piece.sender == rank:
            part = x.narrow(dim, piece.source.start, piece.source.stop - piece.source.start)
            if piece.receiver == rank:
                arrivals.append((piece.target, part))
            else:
                sends.append((piece.receiver, part))
        elif piece.receiver == rank:
            shape = list(x.shape)
            shape[dim] = piece.target.stop - piece.target.start
            buffer = x.new_empty(shape)
            receives.append((piece.sender, buffer))
            arrivals.append((piece.target, buffer))
    finish(start_messages(sends, receives, group))
    shape = list(x.shape)
    shape[dim] = length
    out = x.new_zeros(shape)
    for place, part in arrivals:
        out.narrow(dim, place.start, place.stop - place.start).add_(part)
    return out


class GatherRow(torch.autograd.Function):
    """The tokens of whole rows along `dim`, in order, from the segments that ranks hold; backward sums and shares out.

    `apply(x, layout, dim, group)`. Collective over `group`, both ways.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, dim: int, group: dist.ProcessGroup) -> Tensor:
        """One all-gather, of as many tokens from each rank as the one with most holds."""
        ctx.layout, ctx.dim, ctx.group = layout, dim, group
        mine = x.movedim(dim, 0)
        padded = mine.new_zeros(layout.most_tokens, *mine.shape[1:])
        padded[: len(mine)] = mine
        by_rank = gather_stack(padded[None], group)
        parts = [by_rank[owner, layout.place(s)] for s, owner in enumerate(layout.owners)]
        return torch.cat(parts).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, drow: Tensor) -> tuple[Tensor | None, ...]:
        """One reduce-scatter."""
        layout, drow = ctx.layout, drow.movedim(ctx.dim, 0)
        by_rank = drow.new_zeros(layout.num_ranks, layout.most_tokens, *drow.shape[1:])
        for s, owner in enumerate(layout.owners):
            by_rank[owner, layout.place(s)] = drow[layout.span(s)]
        mine = torch.empty_like(by_rank[0])
        _reduce_scatter(mine, by_rank.flatten(0, 1), group=ctx.group)
        mine = mine[: sum(layout.lengths(dist.get_rank(ctx.group)))]
        return mine.movedim(0, ctx.dim), None, None, None
