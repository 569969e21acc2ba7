"""Tokens on their way to experts: gathered where each expert is cut over `tp`, sent where experts lie on `ep` ranks.

A token that several experts of one rank want is sent there once, with the numbers and weights of those experts; their
outputs are summed by weight over there, and one vector comes back. So each token crosses at most once for each rank
that needs it, each way, and backward likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import expert_order, permute, unpermute
from ..model.ffns.moe import Experts
from ..model.ffns.moe import dispatch as dispatch_here
from ..model.sequence import SequenceContext
from .comm import GatherTokens, ScatterTokens

Meanwhile = Callable[[], Tensor | None]
Dispatch = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Trip:
    """How many rows go to and come from each rank of a group.

    Args:
        counts: rows for each rank.
        arrivals: rows from each rank.
        copies: of the rows that come, how many an expert here gets, those wanted by several counted for each.
        group: the ranks.
    """

    counts: list[int]
    arrivals: list[int]
    copies: int
    group: dist.ProcessGroup

    @property
    def sent(self) -> int:
        """Rows that leave."""
        return sum(self.counts)

    def back(self) -> "Trip":
        """The way home."""
        return Trip(self.arrivals, self.counts, self.copies, self.group)


# From experts of tokens, the number of experts of a rank, and the ranks: what `plan_trip` returns.
Plan = Callable[[Tensor, int, dist.ProcessGroup], tuple[Tensor, Trip]]


def plan_trip(experts_Tk: Tensor, own: int, group: dist.ProcessGroup) -> tuple[Tensor, Trip]:
    """What leaves for ranks that have `own` experts each: one row for each rank that a token needs. Collective.

    Rows sorted by rank, then token: the row of each token for each rank `(T, R)`, -1 for none; and the counts. One
    small all-to-all and one wait of the host.
    """
    rank_Tk = experts_Tk // own
    wanted_TR = torch.zeros(len(experts_Tk), dist.get_world_size(group), dtype=torch.bool, device=experts_Tk.device)
    wanted_TR.scatter_(1, rank_Tk, True)
    by_rank_RT = wanted_TR.t().flatten()
    row_RT = torch.where(by_rank_RT, by_rank_RT.cumsum(0) - 1, -1)
    place_TR = row_RT.view(wanted_TR.shape[::-1]).t().contiguous()
    here = torch.arange(wanted_TR.shape[1], device=wanted_TR.device)
    copies_R = (rank_Tk.flatten() == here[:, None]).sum(1)
    leaving_R2 = torch.stack([wanted_TR.sum(0), copies_R], 1)
    coming_R2 = torch.empty_like(leaving_R2)
    dist.all_to_all_single(coming_R2, leaving_R2, group=group)
    leaving, coming = torch.stack([leaving_R2, coming_R2]).tolist()
    counts, arrivals = ([rows for rows, _ in pairs] for pairs in (leaving, coming))
    return place_TR, Trip(counts, arrivals, sum(copies for _, copies in coming), group)


def _numbers_for_ranks(experts_Tk: Tensor, own: int, place_TR: Tensor, rows: int) -> Tensor:
    """For each row that leaves, its experts as the receiver numbers them, -1 for those of other ranks: int32 `(S, k)`.

    What has no row goes to one behind the last: how many rows there are is known, so the host need not wait again.
    """
    tokens, ranks = place_TR.shape
    row_RT = place_TR.t().flatten()
    source_S = row_RT.new_zeros(rows + 1)
    source_S.scatter_(0, torch.where(row_RT < 0, rows, row_RT), torch.arange(ranks * tokens, device=row_RT.device))
    rank_S, token_S = source_S[:rows] // max(1, tokens), source_S[:rows] % max(1, tokens)
    experts_Sk = experts_Tk[token_S]
    return torch.where(experts_Sk // own == rank_S[:, None], experts_Sk % own, -1).int()


def dispatch_cut(
    experts: Experts,
    x_tD: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    seq: SequenceContext,
    meanwhile: Meanwhile,
    *,
    group: dist.ProcessGroup,
    inner: Dispatch = dispatch_here,
) -> tuple[Tensor, Tensor | None]:
    """The seam `dispatch` where every rank of `group` has a share of each expert's hidden channels.

    All ranks' tokens are gathered, as for a dense layer, and decisions with them; `inner` takes them on. Collective.
    """
    rows, length = seq.shape
    x_TD, weights_Tk, experts_Tk = (
        GatherTokens.apply(share, rows * length, group) for share in (x_tD, weights_tk, experts_tk)
    )
    out_TD, done = inner(experts, x_TD, experts_Tk, weights_Tk, seq, meanwhile)
    return ScatterTokens.apply(out_TD, group), done


def dispatch_over_ranks(
    experts: Experts,
    x_TD: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    seq: SequenceContext,
    meanwhile: Meanwhile,
    *,
    group: dist.ProcessGroup,
    plan: Plan = plan_trip,
) -> tuple[Tensor, Tensor | None]:
    """The seam `dispatch` where rank r of `group` has the r-th share of the experts. Collective.

    How many tokens each rank gets is not known beforehand: going forward, the host waits for these counts once a layer.
    `meanwhile` runs while tokens travel.
    """
    own = experts.num_experts // dist.get_world_size(group)
    place_TR, trip = plan(experts_Tk, own, group)
    local_Sk = _numbers_for_ranks(experts_Tk, own, place_TR, trip.sent)
    tokens, weights, numbers, home = Flight(trip), Flight(trip), Flight(trip), Flight(trip.back())
    sent_SD = StartTrip.apply(permute(x_TD, place_TR, trip.sent), tokens)
    sent_Sk = StartTrip.apply(permute(weights_Tk, place_TR, trip.sent), weights)
    numbers.start(local_Sk, trip)
    done = meanwhile()
    weights_Sk, x_SD = FinishTrip.apply(sent_Sk, weights), FinishTrip.apply(sent_SD, tokens)
    place_Sk, ends_X = expert_order(numbers.wait().long(), own)
    y_SD = unpermute(experts(permute(x_SD, place_Sk, trip.copies), ends_X), weights_Sk, place_Sk)
    back_SD = FinishTrip.apply(StartTrip.apply(y_SD, home), home)
    ones_TR = torch.ones(place_TR.shape, dtype=weights_Tk.dtype, device=x_TD.device)
    return unpermute(back_SD, ones_TR, place_TR), done


class Flight:
    """Rows on a trip, between their start and their arrival, and then their gradients on the way back."""

    def __init__(self, trip: Trip) -> None:
        self.trip = trip
        self._arriving: tuple[Tensor, dist.Work] | None = None

    def start(self, rows: Tensor, trip: Trip) -> Tensor:
        """Begin to send; what is returned holds the arrivals after `wait`."""
        arrived, rows = rows.new_empty(sum(trip.arrivals), *rows.shape[1:]), rows.contiguous()
        work = dist.all_to_all_single(arrived, rows, trip.arrivals, trip.counts, group=trip.group, async_op=True)
        assert work is not None
        self._arriving = arrived, work
        return arrived

    def wait(self) -> Tensor:
        """What has arrived, when it has."""
        assert self._arriving is not None
        (arrived, work), self._arriving = self._arriving, None
        work.wait()
        return arrived


class StartTrip(torch.autograd.Function):
    """`apply(rows, flight)`: rows leave, and are returned for `FinishTrip`, which must follow. Collective."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        """One all-to-all begins."""
        ctx.flight = flight
        flight.start(rows, flight.trip)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        """Gradients that `FinishTrip` sent have arrived."""
        ctx.flight.wait()
        return drows, None


class FinishTrip(torch.autograd.Function):
    """`apply(sent, flight)`: rows have arrived; what is computed between start and finish runs while they travel.

    Backward the gradients leave here and arrive in `StartTrip`, and autograd runs in between what was between.
    """

    @staticmethod
    def forward(ctx: Any, sent: Tensor, flight: Flight) -> Tensor:
        """The arrivals."""
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, darrived: Tensor) -> tuple[Tensor, None]:
        """One all-to-all begins."""
        return ctx.flight.start(darrived, ctx.flight.trip.back()), None
