"""Passing recurrent states along a sequence whose segments lie on several ranks: exclusive scans of affine maps.

Given every segment's summary `(M, S)`, each segment gets the state that enters it, the composition of all summaries
before it applied to nothing. In reverse, with adjoint `M`, the same scan carries gradients from the last segment to the
first. Bytes sent do not depend on the number of tokens. With n runs of segments (a run lies on one rank and needs no
message inside) and S the bytes of a state:

- `chain`: each run sends its outgoing state to the next, n - 1 hops; a rank sends S a run, the least possible.
- `doubling`: ceil(log2 n) rounds (Hillis and Steele 1986, made exclusive); a rank sends S + M a run and round.
- `gather`: one all-gather of all summaries, (n - 1) (S + M); each rank composes what comes before it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.affine import Transition
from .comm import Message, finish, gather_stack, start_messages
from .config import Exchange
from .layout import SequenceLayout

# What a hop and a byte are taken to cost between processes of one machine and of several, for `choose`: seconds.
HOP_S = 20e-6
BYTE_S = {"inside": 1 / 100e9, "across": 1 / 20e9}

Summary = tuple[Tensor, Tensor]


def choose(num_runs: int, ranks: int, state_bytes: int, transition_bytes: int = 0, *, on_one_machine: bool) -> Exchange:
    """The exchange that should take the least time for `num_runs` runs of segments on `ranks` ranks.

    `transition_bytes`, of an `M`, count beside the state's in all but `chain`. All ranks must ask alike.
    Between two runs all are the same; beyond, `chain` sends least, but in the most hops.
    """
    byte_s = BYTE_S["inside" if on_one_machine else "across"]
    state_s, summary_s = byte_s * state_bytes, byte_s * (state_bytes + transition_bytes)
    hops = num_runs - 1
    seconds: dict[Exchange, float] = {
        "chain": hops * (HOP_S + state_s),
        "doubling": hops.bit_length() * (HOP_S + -(-num_runs // ranks) * summary_s),
        "gather": HOP_S + hops * summary_s,
    }
    return min(seconds, key=lambda name: seconds[name])


@dataclass(frozen=True)
class StateExchange:
    """The exclusive scan over the segments of a layout; every rank of `group` calls it alike.

    Args:
        layout: which rank holds which segment.
        group: the ranks of the context-parallel axis.
        how: `chain`, `doubling`, `gather`, or `auto` by `choose`.
        transition: how the operator's `M` acts.
        on_one_machine: whether the ranks are, for `choose`.
    """

    layout: SequenceLayout
    group: dist.ProcessGroup
    how: Exchange
    transition: Transition
    on_one_machine: bool = False

    def start(self, M: list[Tensor], S: list[Tensor], *, reverse: bool = False) -> "Running":
        """Begin with the summaries of this rank's segments, in order; see `kernels/ssd/exchange.py`."""
        scan = _Scan(self, dist.get_rank(self.group), M, S, reverse)
        return Running(scan.run(), S[0])


@cache
def _exchange_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Running:
    """An exchange whose first messages are under way; on CUDA all of it, on a stream of its own."""

    def __init__(self, steps: Generator[None, None, list[Tensor | None]], like: Tensor) -> None:
        self._steps = steps
        self._arrived: list[Tensor | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        if like.is_cuda:
            self._stream = _exchange_stream(like.device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._finish()
        else:
            self._step()

    @property
    def done(self) -> bool:
        """Whether everything has arrived already; what runs on another stream counts as under way."""
        return self._arrived is not None and self._stream is None

    def wait(self) -> list[Tensor | None]:
        """The state that arrives at each of this rank's segments, None where nothing does."""
        self._finish()
        assert self._arrived is not None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            for state in self._arrived:
                if state is not None:
                    state.record_stream(torch.cuda.current_stream())
        return self._arrived

    def _step(self) -> None:
        try:
            next(self._steps)
        except StopIteration as end:
            self._arrived = end.value

    def _finish(self) -> None:
        while self._arrived is None:
            self._step()


class _Scan:
    """One exchange on one rank. Runs are numbered in the order in which the state travels."""

    def __init__(self, exchange: StateExchange, rank: int, M: list[Tensor], S: list[Tensor], reverse: bool) -> None:
        self.group, self.transition, self.rank = exchange.group, exchange.transition, rank
        layout = exchange.layout
        own = {s: i for i, s in enumerate(layout.of_rank(rank))}
        runs = [list(run) for run in layout.runs]
        if reverse:
            M = [self.transition.adjoint(m) for m in M]
            runs = [run[::-1] for run in reversed(runs)]
        self.owners = [layout.owners[run[0]] for run in runs]
        self.segments = {i: [own[s] for s in run] for i, run in enumerate(runs) if self.owners[i] == rank}
        self.M, self.S = M, S
        self.how = exchange.how
        if self.how == "auto":
            self.how = choose(
                len(runs), layout.num_ranks, S[0].nbytes, M[0].nbytes, on_one_machine=exchange.on_one_machine
            )

    def run(self) -> Generator[None, None, list[Tensor | None]]:
        """Yields while messages are under way; returns what arrives at each of this rank's segments."""
        scan = {"chain": self._chain, "doubling": self._doubling, "gather": self._gather}[self.how]
        arriving = yield from scan()
        found: list[Tensor | None] = [None] * len(self.S)
        for run, state in arriving.items():
            for segment in self.segments[run]:
                found[segment] = state
                state = self._through(segment, state)
        return found

    def _through(self, segment: int, state: Tensor | None) -> Tensor:
        """What leaves a segment that a state enters."""
        return self.S[segment] if state is None else self.transition.apply(self.M[segment], state) + self.S[segment]

    def _summary(self, run: int) -> Summary:
        first, *rest = self.segments[run]
        summary = self.M[first], self.S[first]
        for segment in rest:
            summary = self.transition.compose((self.M[segment], self.S[segment]), summary)
        return summary

    def _chain(self) -> Generator[None, None, dict[int, Tensor | None]]:
        arriving: dict[int, Tensor | None] = {}
        for run, segments in self.segments.items():
            state: Tensor | None = None
            if run > 0:
                state = torch.empty_like(self.S[0], memory_format=torch.contiguous_format)
                works = start_messages([], [(self.owners[run - 1], state)], self.group)
                yield
                finish(works)
            arriving[run] = state
            if run + 1 < len(self.owners):
                for segment in segments:
                    state = self._through(segment, state)
                assert state is not None
                finish(start_messages([(self.owners[run + 1], state)], [], self.group))
        return arriving

    def _doubling(self) -> Generator[None, None, dict[int, Tensor | None]]:
        """After round k a run's `window` holds 2^(k+1) runs up to its own, `before` those of them before it."""
        compose = self.transition.compose
        window = {run: self._summary(run) for run in self.segments}
        before: dict[int, Summary | None] = dict.fromkeys(self.segments)
        reach = 1
        while reach < len(self.owners):
            works, arrived = self._send_windows(window, reach)
            yield
            finish(works)
            for run, earlier in arrived.items():
                later = before[run]
                before[run] = earlier if later is None else compose(later, earlier)
                window[run] = compose(window[run], earlier)
            reach *= 2
        return {run: None if summary is None else summary[1] for run, summary in before.items()}

    def _send_windows(self, window: dict[int, Summary], reach: int) -> tuple[list[dist.Work], dict[int, Summary]]:
        """Begin to send every run's window to the run `reach` further; what arrives here, by run."""
        sends: list[Message] = []
        receives: list[Message] = []
        arrived: dict[int, Summary] = {}
        for run in range(len(self.owners) - reach):
            source, target = self.owners[run], self.owners[run + reach]
            if source == self.rank == target:
                arrived[run + reach] = window[run]
            elif source == self.rank:
                sends.append((target, _pack(window[run])))
            elif target == self.rank:
                M, S = window[run + reach]
                message = S.new_empty(M.numel() + S.numel())
                arrived[run + reach] = _unpack(message, window[run + reach])
                receives.append((source, message))
        return start_messages(sends, receives, self.group), arrived

    def _gather(self) -> Generator[None, None, dict[int, Tensor | None]]:
        own = [_pack(self._summary(run)) for run in self.segments]
        most = max(self.owners.count(rank) for rank in self.owners)
        own += [torch.zeros_like(own[0])] * (most - len(own))
        all_runs = gather_stack(torch.stack(own), self.group)
        yield
        place = {rank: iter(range(rank * most, (rank + 1) * most)) for rank in self.owners}
        like = self.M[0], self.S[0]
        arriving: dict[int, Tensor | None] = {}
        state: Tensor | None = None
        for run, owner in enumerate(self.owners):
            if run in self.segments:
                # A copy: what is remembered of it should not keep all runs' summaries.
                arriving[run] = None if state is None else state.clone()
            M, S = _unpack(all_runs[next(place[owner])], like)
            state = S if state is None else self.transition.apply(M, state) + S
        return arriving


def _pack(summary: Summary) -> Tensor:
    """A summary as one message."""
    return torch.cat([part.flatten() for part in summary])


def _unpack(message: Tensor, like: Summary) -> Summary:
    """The summary in a message, sharing its memory."""
    M, S = like
    return message[: M.numel()].view(M.shape), message[M.numel() :].view(S.shape)
