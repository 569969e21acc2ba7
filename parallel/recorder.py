"""What PyTorch's flight recorder tells of NCCL: how far a process came in each group, and who did not come as far.

The host goes on while a collective waits on the device, and then stands at some read of a tensor. That it waits for
others shows in the recorder alone, by the number of the first collective that has not ended.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch._C import _distributed_c10d as c10d

# What goes through the store and into a line: groups, and letters of a name.
MOST_GROUPS, MOST_LETTERS = 32, 60
# NCCL's recorder, then the one that gloo and other backends share; a build without NCCL has only that.
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


@dataclass(frozen=True)
class Reached:
    """How far a process came in a group of processes.

    Attributes:
        group: the same for all members of the group, and for no other group.
        name: of the group, for people.
        number, what: of the last collective that its host asked for.
        pending, pending_what: of the first that its device has not finished; 0 where there is none.
        talks: whether a send or receive is not finished.
    """

    group: str
    name: str
    number: int
    what: str
    pending: int = 0
    pending_what: str = ""
    talks: bool = False

    def __str__(self) -> str:
        waits = f", waits for {self.pending} ({self.pending_what})" if self.pending else ""
        talks = ", waits for a send or receive" if self.talks else ""
        return f"group {self.name}: came to collective {self.number} ({self.what or 'unknown'}){waits}{talks}"


@dataclass
class _Seen:
    """What the recorder holds of a group, in the order in which it was asked for."""

    numbers: dict[int, str] = field(default_factory=dict)
    number: int = 0
    pending: int = 0
    talks: bool = False

    def add(self, number: int, what: str, is_done: bool, is_p2p: bool) -> None:
        """A send or receive has the number of the last collective, and so has the entry that ends a batch of them.

        Only that entry of a batch is ever marked as done. The device keeps the order of what it does in a group.
        """
        self.number = max(self.number, number)
        if is_p2p or number in self.numbers:
            self.talks = not is_done
            return
        self.pending = 0 if is_done else self.pending or number
        self.numbers[number] = what


def read_recorder() -> bytes:
    """What the recorder holds of the last collectives, as JSON; nothing where no recorder holds any."""
    for name in RECORDERS:
        dump = getattr(c10d, name, None)
        found = dump() if dump else b""
        found = found if isinstance(found, bytes) else found.encode()
        if b'"entries"' in found:
            return found
    return b""


def last_collectives(recording: bytes) -> tuple[Reached, ...]:
    """How far this process came in each group; nothing where the recording is damaged or of another kind."""
    try:
        recorded = json.loads(recording)
        groups = recorded.get("pg_config") or {}
        seen: dict[tuple[str, str], _Seen] = {}
        for entry in recorded.get("entries") or ():
            _take(entry, seen)
        reached = [_reached(name, desc, groups, found) for (name, desc), found in seen.items()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ()
    # Where there are too many, those that it waits in, then those that were used last.
    kept = sorted(reached, key=lambda found: bool(found.pending or found.talks))[-MOST_GROUPS:]
    return tuple(sorted(kept, key=lambda found: (found.name, found.group)))


def _take(entry: Any, seen: dict[tuple[str, str], _Seen]) -> None:
    """Take an entry of the recorder in; one that lacks something is left out."""
    try:
        group = tuple(entry["process_group"])
        number, title = entry["collective_seq_id"], entry["profiling_name"]
        is_done, is_p2p = entry["state"] == "completed", bool(entry["is_p2p"])
    except (TypeError, LookupError):
        return
    if [*map(type, group), type(number), type(title)] != [str, str, int, str]:
        return
    # A collective of gloo is never marked as done; Python shows the wait for it.
    if not title.startswith("gloo:"):
        seen[group] = seen.pop(group, _Seen())
        seen[group].add(number, title.partition(":")[2] or title, is_done, is_p2p)


def _reached(name: str, desc: str, groups: Mapping[str, Any], seen: _Seen) -> Reached:
    """A name alone is not enough: groups that `split_group` makes at once share it."""
    ranks = str(groups.get(name, {}).get("ranks", ""))
    shown = desc if desc not in ("", "undefined") else name
    return Reached(
        f"{name[:MOST_LETTERS]}/{zlib.crc32(ranks.encode()):08x}",
        shown[:MOST_LETTERS],
        seen.number,
        seen.numbers.get(seen.number, "")[:MOST_LETTERS],
        seen.pending,
        seen.numbers.get(seen.pending, "")[:MOST_LETTERS],
        seen.talks,
    )


def find_behind(reached: Mapping[int, Iterable[Reached]]) -> tuple[list[int], str]:
    """Whose host did not come to a collective in which the devices of others wait, and to which; else nobody.

    Where one waits for another that waits itself, the last of them is meant; all where they wait in a circle.
    """
    groups: dict[str, dict[int, Reached]] = {}
    for rank, found in reached.items():
        for one in found:
            groups.setdefault(one.group, {})[rank] = one
    behind: dict[str, set[int]] = {}
    waiting = {rank for rank, found in reached.items() if any(one.talks for one in found)}
    for group, members in groups.items():
        least = min(one.number for one in members.values())
        waiting |= {rank for rank, one in members.items() if one.pending > least}
        most = max(one.pending for one in members.values())
        if late := {rank for rank, one in members.items() if one.number < most}:
            behind[group] = late
    late = set().union(*behind.values())
    late = late - waiting or late
    if not late:
        return [], ""
    group = max(behind, key=lambda group: len(behind[group] & late))
    first = max(groups[group].values(), key=lambda one: one.pending)
    what = f"did not come to collective {first.pending} ({first.pending_what}) of group {first.name}"
    return sorted(behind[group] & late), what
