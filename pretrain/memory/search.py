"""How a start finds copies in memory: all ranks tell what they hold, and each takes its own or is sent its peer's."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.host_copy import HostCopy
from ..checkpoint_files.folders import checkpoint_step, remove, step_name
from ..checkpoint_files.manifest import CheckpointDamagedError, CheckpointError
from .copy_file import Copied, look_at, read_copy
from .exchange import Parcel, exchange
from .folder import find_copies, place_of
from .identity import Identity
from .plan import Holding, Plan, choose, why_not

logger = logging.getLogger(__name__)


class Search:
    """Looks through the copies of a run, of all machines. Collective.

    Args:
        run: the run's folder on this machine.
        identity: what a copy must be of.
        host: where this rank's is read to.
        group: of all ranks, for the CPU.
    """

    def __init__(self, run: Path, identity: Identity, host: HostCopy, group: dist.ProcessGroup) -> None:
        self._run, self._identity, self._host, self._group = run, identity, host, group
        self._rank = dist.get_rank()
        # Seen to be damaged, and not looked at again.
        self._bad: set[tuple[int, str]] = set()

    def load(self, later_than: int, before: int, rewinds: int) -> tuple[Plan, Copied] | None:
        """Read the newest copies that are there for every rank into host memory; None where there are none of use.

        A damaged copy counts as missing. Rank 0 says in one line what newer ones there were and why they are of no use.

        Args:
            later_than: copies of this step and earlier ones are not looked at,
            before: nor of this one and later ones.
            rewinds: how often the run has gone back by now; copies from before that are not used.

        Returns:
            what is gone on from, and this rank's copy.
        """
        while True:
            holdings, pieces = self._tell(later_than, before, rewinds)
            plan = choose(holdings, pieces)
            if plan is None:
                if self._rank == 0 and (reason := why_not(holdings, pieces)):
                    logger.warning("%s; the run goes on without them", reason)
                return None
            copied, damage = self._take(plan)
            everyone = self._gather(damage)
            if not any(everyone):
                assert copied is not None
                return plan, copied
            for source, found in zip(plan.sources, everyone, strict=True):
                if found:
                    self._bad.add((source.seen_by, source.path))
                    self._warn(f"rank {source.owner}'s copy in memory of step {plan.moment.step}: {found}")

    def _tell(self, later_than: int, before: int, rewinds: int) -> tuple[list[Holding], list[str]]:
        """What all ranks see on their machines, and what each must find in its copy."""
        mine, damage = [], []
        for keeper, owner, path in find_copies(self._run):
            if not later_than < checkpoint_step(path) < before or (self._rank, str(path)) in self._bad:
                continue
            try:
                mine.append(look_at(path, keeper, owner, self._rank, self._identity, rewinds))
            except CheckpointError as error:
                self._bad.add((self._rank, str(path)))
                damage.append(str(error))
        everyone = self._gather((mine, damage, self._identity.pieces))
        for line in dict.fromkeys(line for _, lines, _ in everyone for line in lines):
            self._warn(line)
        return [holding for found, _, _ in everyone for holding in found], [pieces for _, _, pieces in everyone]

    def _take(self, plan: Plan) -> tuple[Copied | None, str]:
        """Send and receive what does not lie where it is needed, one copy after another, and read this rank's.

        Returns:
            the copy, and where it is damaged why.
        """
        path, damage = Path(plan.sources[self._rank].path), ""
        for source in plan.sources:
            if source.seen_by == source.owner:
                continue
            send = receive = None
            if self._rank == source.seen_by:
                send = Parcel(source.owner, Path(source.path), source.owner)
            elif self._rank == source.owner:
                path = place_of(self._run, self._rank, self._rank) / step_name(plan.moment.step)
                receive = Parcel(source.owner, path, source.seen_by)
            try:
                exchange(send, receive, self._group)
            except (OSError, CheckpointError) as error:
                if receive:  # what could not be read is met by the other rank too
                    damage = str(error)
        if damage:
            return None, damage
        source = plan.sources[self._rank]
        try:
            copied = read_copy(path, self._rank, self._host.tensors)
            if copied.manifest != source.manifest:
                raise CheckpointDamagedError(f"{path} is not what rank {source.seen_by} told of")
            return copied, ""
        except (OSError, CheckpointError) as error:
            if source.seen_by != self._rank and path.exists():
                remove(path)
            return None, str(error)

    def _warn(self, damage: str) -> None:
        if self._rank == 0:
            logger.warning("%s; it counts as missing", damage)

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone
