"""Processes that were started one by one find each other; who has not come is named, and a port that is taken too."""

import os
import platform
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..errors import UserError
from .heartbeat import spans
from .rejoin import name_start

PREFIX = "headrace/join"
VERDICT, ALL_CAME = "verdict", "all came"
RETRY_S = 0.2
# Who keeps the store stays so long at most for others to read why the run does not start.
PART_S = 3.0


@dataclass(frozen=True)
class Place:
    """This process among all, and where they meet."""

    rank: int
    size: int
    host: str
    port: int

    @property
    def me(self) -> str:
        """This process in words."""
        return f"rank {self.rank} ({platform.node()})"

    @property
    def address(self) -> str:
        """Where rank 0 listens."""
        return f"{self.host}:{self.port}"


def join_group(backend: str, timeout_s: float) -> str:
    """Start the process group that the environment describes, as torchrun and slurm do. Collective.

    Under torchrun the launcher keeps the store, over several starts; otherwise rank 0 keeps it.

    Returns the name of this start in a store that a launcher keeps; empty otherwise.

    Raises:
        UserError: the environment describes half a group, the port is taken, two processes claim one rank, or some do
            not come within `timeout_s`, which are named.
    """
    place, name = read_place(), ""
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _open_store(place, timeout_s, time.monotonic() + timeout_s, keeps=False)
            name = name_start(store, place.rank, place.size, timeout_s)
        else:
            store = meet(place, timeout_s)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"default_pg/{name}", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout_s),
        )
        return name
    except RuntimeError as error:
        raise UserError(
            f"{place.me} did not find all {place.size} processes at {place.address} within {timeout_s:g} s; start them "
            f"all, with the same address ({_first_line(error)})"
        ) from None


def read_place() -> Place:
    """What RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    Raises:
        UserError: one is not set, or is no number that it could be.
    """
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK is set but {', '.join(missing)} is not; start with torchrun or --nproc, or unset RANK")
    rank, size, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise UserError(f"RANK={rank} must be a number below WORLD_SIZE={size}")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port} is no port; use a number between 1024 and 65535")
    return Place(int(rank), int(size), os.environ["MASTER_ADDR"], int(port))


def meet(place: Place, timeout_s: float) -> dist.Store:
    """The store of all processes, once they have all come; rank 0 keeps it. Collective.

    Raises:
        UserError: as `join_group`.
    """
    until = time.monotonic() + timeout_s
    if place.rank:
        _reach(place, timeout_s, until)
    try:
        store = _open_store(place, timeout_s, until, keeps=place.rank == 0)
    except RuntimeError as error:
        if place.rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"port {place.port} of {platform.node()} is in use, where the processes were to meet "
                f"(MASTER_PORT={place.port}); set MASTER_PORT to a free one for all of them, or end what listens there"
            ) from None
        raise UserError(
            f"{place.me}: nothing at {place.address} answers as rank 0 of a run would ({_first_line(error)}); "
            "set MASTER_ADDR and MASTER_PORT to rank 0's machine and a free port there"
        ) from None
    call_roll(dist.PrefixStore(PREFIX, store), place, timeout_s, until)
    return store


def _reach(place: Place, timeout_s: float, until: float) -> None:
    """Wait until something listens where rank 0 should. TCPStore itself writes pages while nothing does."""
    while True:
        try:
            socket.create_connection((place.host, place.port), max(RETRY_S, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{place.me} found no rank 0 at {place.address} within {timeout_s:g} s "
                    f"({error.strerror or error}); start rank 0 too, with the same MASTER_ADDR and MASTER_PORT"
                ) from None
        time.sleep(RETRY_S)


def _open_store(place: Place, timeout_s: float, until: float, keeps: bool) -> dist.Store:
    """In a thread: TCPStore waits for ever for a stranger that takes its connection and says nothing."""
    found: list[dist.Store | RuntimeError] = []

    def connect() -> None:
        try:
            found.append(
                dist.TCPStore(
                    place.host,
                    place.port,
                    is_master=keeps,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=timeout_s),
                )
            )
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="headrace_join", daemon=True)
    thread.start()
    thread.join(max(RETRY_S, until - time.monotonic()))
    if not found:
        raise RuntimeError(f"no answer within {timeout_s:g} s")
    if isinstance(found[0], RuntimeError):
        raise found[0]
    return found[0]


def call_roll(store: dist.Store, place: Place, timeout_s: float, until: float) -> None:
    """Wait until all processes have come. Collective.

    The first whose time is up says who is missing, and all end with that. Each process sends a handful of requests,
    however many there are.

    Args:
        store: of this run alone.
        place: this process.
        timeout_s: how long was waited in all, for the message.
        until: when this process gives up, on the clock `time.monotonic`.

    Raises:
        UserError: some did not come, two claim one rank, or this process is of another run.
    """
    try:
        _sign(store, place)
        if store.add("arrived", 1) == place.size:
            store.compare_set(VERDICT, "", ALL_CAME)
        try:
            store.wait([VERDICT], timedelta(seconds=max(RETRY_S, until - time.monotonic())))
        except dist.DistStoreError:  # the time is up
            store.compare_set(VERDICT, "", _who_is_missing(store, place, timeout_s))
        verdict = store.get(VERDICT).decode()
        if verdict == ALL_CAME:
            return
        store.add("told", 1)
        if place.rank == 0:
            while store.add("told", 0) < store.add("arrived", 0) and time.monotonic() < until + PART_S:
                time.sleep(RETRY_S / 4)
    except RuntimeError as error:
        raise UserError(
            f"{place.me} lost rank 0 at {place.address} before all {place.size} processes had come "
            f"({_first_line(error)}); see what rank 0 said, and start them all again"
        ) from None
    raise UserError(verdict, everywhere=True)


def _sign(store: dist.Store, place: Place) -> None:
    size = store.compare_set("size", "", str(place.size)).decode()
    remedy = "give every run a MASTER_PORT of its own, and every process its own RANK"
    if size != str(place.size):
        raise UserError(
            f"{place.me} is one of {place.size} processes, but those that meet at {place.address} are {size}; {remedy}"
        )
    mine = f"process {os.getpid()} on {platform.node()}"
    if (first := store.compare_set(f"rank/{place.rank}", "", mine).decode()) != mine:
        raise UserError(f"two processes are rank {place.rank} at {place.address}: {first} and {mine}; {remedy}")


def _who_is_missing(store: dist.Store, place: Place, timeout_s: float) -> str:
    missing = [rank for rank in range(place.size) if not store.check([f"rank/{rank}"])]
    who = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {spans(missing)} are"
    return (
        f"{place.size - len(missing)} of {place.size} processes came to {place.address} within {timeout_s:g} s: {who} "
        "missing; start all of them, with the same MASTER_ADDR and MASTER_PORT"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
