"""Processes that an elastic launcher starts again find each other in a store that remembers earlier starts.

The launcher may keep one store for all starts of a job (torchrun does), and its count of starts may differ from machine
to machine. What an earlier start left under the same keys would be taken for this one's: addresses of processes that
are gone, verdicts on them. So every start gets a name of its own.
"""

import json
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from ..errors import UserError
from .heartbeat import spans

NAME = "headrace/start"
LOOK_S = 1.0
RETRY_S = 0.05


def name_start(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """The name of this start, the same on all its processes, and of no other start. Collective.

    Rank 0 makes it up and lets the others sign it; who finds that the name lists another signature than its own has
    read that of an earlier start, and reads again.

    Raises:
        UserError: some did not come within `timeout_s`.
    """
    return _lead(store, size, timeout_s) if rank == 0 else _follow(store, rank, timeout_s)


def _lead(store: dist.Store, size: int, timeout_s: float) -> str:
    name = uuid4().hex
    store.set(NAME, name)
    keys = [f"{NAME}/{name}/{rank}" for rank in range(1, size)]
    try:
        if keys:
            store.wait(keys, timedelta(seconds=timeout_s))
    except dist.DistStoreError:
        missing = [rank for rank, key in enumerate(keys, 1) if not store.check([key])]
        who = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {spans(missing)} are"
        raise UserError(
            f"{size - len(missing)} of {size} processes came within {timeout_s:g} s: {who} missing; see their logs"
        ) from None
    store.set(f"{NAME}/{name}/all", json.dumps([signature.decode() for signature in map(store.get, keys)]))
    return name


def _follow(store: dist.Store, rank: int, timeout_s: float) -> str:
    signature, until = uuid4().hex, time.monotonic() + timeout_s
    while (left_s := until - time.monotonic()) > 0:
        try:
            store.wait([NAME], timedelta(seconds=left_s))
            name = store.get(NAME).decode()
            store.set(f"{NAME}/{name}/{rank}", signature)
            store.wait([f"{NAME}/{name}/all"], timedelta(seconds=min(left_s, LOOK_S)))
            if signature in json.loads(store.get(f"{NAME}/{name}/all")):
                return name
        except dist.DistStoreError:  # the time is up, of this look or of all
            continue
        time.sleep(RETRY_S)
    raise UserError(f"rank {rank} found no rank 0 of its own start within {timeout_s:g} s; see rank 0's log")
