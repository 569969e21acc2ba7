"""Starts that share a store with earlier ones: each finds its own processes, whatever those before left there."""

import threading
from datetime import timedelta
from uuid import uuid4

import pytest
import torch.distributed as dist

from headrace.errors import UserError
from headrace.parallel.rejoin import NAME, name_start


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Start:
    """Processes of one start, each a thread with a connection of its own."""

    def __init__(self, server: dist.TCPStore, size: int, timeout_s: float = 20.0) -> None:
        self._server, self._size, self._timeout_s = server, size, timeout_s
        self._threads: list[threading.Thread] = []
        self.found: dict[int, str] = {}

    def begin(self, *ranks: int) -> "Start":
        for rank in ranks:
            self._threads.append(threading.Thread(target=self._run, args=(rank,), daemon=True))
            self._threads[-1].start()
        return self

    def _run(self, rank: int) -> None:
        limit = timedelta(seconds=10)
        store = dist.TCPStore("127.0.0.1", self._server.port, is_master=False, wait_for_workers=False, timeout=limit)
        try:
            self.found[rank] = name_start(store, rank, self._size, self._timeout_s)
        except UserError as error:
            self.found[rank] = str(error)

    def names(self) -> set[str]:
        for thread in self._threads:
            thread.join(60)
        assert len(self.found) == len(self._threads)
        return set(self.found.values())


def test_every_start_has_a_name_of_its_own(server: dist.TCPStore) -> None:
    names = [Start(server, 3).begin(*order).names() for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    assert all(len(found) == 1 for found in names)
    assert len(set.union(*names)) == 3


def test_what_earlier_starts_left_is_passed_over(server: dist.TCPStore) -> None:
    """One that was complete, and one that ended before all had come; those that come first see the old name."""
    (old,) = Start(server, 3).begin(0, 1, 2).names()
    late = Start(server, 3).begin(1, 2)
    while not server.check([f"{NAME}/{old}/1"]):
        pass
    (new,) = late.begin(0).names()
    assert new != old
    server.set(NAME, uuid4().hex)  # of a rank 0 that died at once
    last = Start(server, 3).begin(2, 1)
    (name,) = last.begin(0).names()
    assert name not in (old, new)


def test_who_does_not_come_is_named(server: dist.TCPStore) -> None:
    assert Start(server, 4, timeout_s=1.0).begin(0, 2).names() == {
        "2 of 4 processes came within 1 s: ranks 1, 3 are missing; see their logs",
        "rank 2 found no rank 0 of its own start within 1 s; see rank 0's log",
    }
