"""What a process knows of the others from their heartbeats, by its own clock, and whom it finds missing."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# `failed`: a collective met an error here; `left`: ended as the others do; `error`: ended by an error of its own.
State = Literal["runs", "failed", "left", "error"]
TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Beat:
    """What a process last said of itself.

    Attributes:
        count: grows with every beat; nothing else tells that the process is alive.
        step: the last step it finished; None before the first since its start.
        host: the machine it runs on.
        state: how it is.
        reason: the error it left with, or `TIMED_OUT` where that is how a collective failed.
        seconds: of its own work in a usual step, and of the whole step; None while unknown.
    """

    count: int = 0
    step: int | None = None
    host: str = "host unknown"
    state: State = "runs"
    reason: str = ""
    seconds: tuple[float, float] | None = None

    def pack(self) -> str:
        """The text that `unpack` reads."""
        return json.dumps(dataclasses.astuple(self))

    @staticmethod
    def unpack(text: bytes) -> "Beat":
        """The beat that `pack` wrote."""
        told = json.loads(text)
        told[-1] = told[-1] and tuple(told[-1])
        return Beat(*told)


class RollCall:
    """The beats heard so far and the time by which they are judged.

    Clocks of machines are never compared, and time that this process itself was stopped does not count: whoever drives
    it tells with `pass_time` how much went by. Rank 0 hears all processes, the others hear rank 0.

    Args:
        rank: this process.
        size: number of processes.
        limit_s: silence after which a process counts as missing.
        grace_s: the same once a collective has failed somewhere; also how long a process that has left is given to be
            followed by the others for the reason it had itself.
        keeper: who keeps the store that beats go through; None: rank 0.
        host: the machine this process runs on.
    """

    def __init__(
        self, rank: int, size: int, limit_s: float, grace_s: float, keeper: str | None = None, host: str = ""
    ) -> None:
        self.heard = range(1, size) if rank == 0 else range(1)
        self._rank, self._size, self._limit_s, self._grace_s = rank, size, limit_s, grace_s
        self._keeper, self._host = keeper, host
        self._time = self._heard_at = 0.0
        self._failed_at: float | None = None
        self._timed_out = False
        self._beats = dict.fromkeys(self.heard, Beat())
        self._changed_at = dict.fromkeys(self.heard, 0.0)
        self._state_since = dict.fromkeys(self.heard, 0.0)

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self._time += seconds

    def hear(self, beats: Mapping[int, Beat]) -> None:
        """Take in what the store holds now for each rank of `heard`."""
        self._heard_at = self._time
        for rank, beat in beats.items():
            if beat.state != self._beats[rank].state:
                self._state_since[rank] = self._time
                if beat.state == "failed":
                    self.fail(beat.reason == TIMED_OUT)
            if beat != self._beats[rank]:
                self._changed_at[rank] = self._time
            self._beats[rank] = beat

    def fail(self, timed_out: bool) -> None:
        """A collective has failed, here or elsewhere: from now on the shorter limit holds."""
        self._failed_at = self._time if self._failed_at is None else self._failed_at
        self._timed_out |= timed_out

    @property
    def beats(self) -> dict[int, Beat]:
        """The last beat of each process heard, and one in the name of this one."""
        return self._beats | {self._rank: Beat(host=self._host)}

    @property
    def step(self) -> int | None:
        """The last step that any process heard has finished."""
        return max((beat.step for beat in self._beats.values() if beat.step is not None), default=None)

    @property
    def alone(self) -> bool:
        """Whether every process heard has said farewell or is silent."""
        return all(self._silence(rank) >= self._grace_s for rank in self._in_state("runs", "failed"))

    def finding(self, failed_here: bool = False) -> str | None:
        """Who is missing and why, as the beginning of a sentence; None while nobody is.

        Args:
            failed_here: a collective has failed on this process, which therefore did take part in it.
        """
        limit_s = self._limit_s if self._failed_at is None else self._grace_s
        if errors := self._in_state("error"):
            first = min(errors, key=self._state_since.__getitem__)
            if self._time - self._state_since[first] < self._grace_s:
                return None
            return f"{self._name([first])} left with an error: {self._beats[first].reason}"
        store_left = self._keeper is None and self._beats.get(0, Beat()).state == "left"
        if (silence := self._time - self._heard_at) >= limit_s and not store_left:
            return f"{self._keeper or self._name([0])} has not been heard of for {silence:.0f} s"
        if silent := [r for r in self._in_state("runs", "failed") if self._silence(r) >= limit_s]:
            verb = "has" if len(silent) == 1 else "have"
            return f"{self._name(silent)} {verb} not been heard of for {min(map(self._silence, silent)):.0f} s"
        if self._failed_at is None or self._time - self._failed_at < self._grace_s:
            return None
        if left := self._in_state("left"):
            reason = self._beats[left[0]].reason
            return f"{self._name(left)} left before the others{reason and ': '}{reason}"
        return self._late(failed_here)

    def _late(self, failed_here: bool) -> str | None:
        """Who waited for a peer until time ran out says so: the few that do not are who was waited for."""
        late = {rank: self._beats[rank].host for rank in self._in_state("runs")}
        if not failed_here:
            late[self._rank] = self._host
        if self._rank != 0 or not self._timed_out or not late or 2 * len(late) > self._size:
            return None
        verb = "does" if len(late) == 1 else "do"
        return f"{name_ranks(late)} {verb} run, but did not come to a step where the others waited until time ran out"

    def _silence(self, rank: int) -> float:
        """For how long a process has been heard to say nothing; what the store did not pass on is not silence."""
        return self._heard_at - self._changed_at[rank]

    def _in_state(self, *states: State) -> list[int]:
        return [rank for rank, beat in self._beats.items() if beat.state in states]

    def _name(self, ranks: Iterable[int]) -> str:
        return name_ranks({rank: self._beats[rank].host for rank in ranks})


def name_ranks(hosts: Mapping[int, str]) -> str:
    """Ranks and where they run, in few words: `rank 3 (node1)`, `ranks 0-7 (node1), 9 (node2)`."""
    by_host: dict[str, list[int]] = {}
    for rank, host in sorted(hosts.items()):
        by_host.setdefault(host, []).append(rank)
    named = [f"{spans(ranks)} ({host})" for host, ranks in by_host.items()]
    return f"rank{'s' if len(hosts) > 1 else ''} {', '.join(named)}"


def spans(ranks: list[int]) -> str:
    """Ascending ranks in few words: `0-7, 9`."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][-1] + 1:
            found[-1] = [found[-1][0], rank]
        else:
            found.append([rank])
    return ", ".join("-".join(map(str, span)) for span in found)
