"""A pool of worker processes that run test functions as the ranks of a gloo process group.

Workers start when first needed and stay for the whole test session, so a distributed test costs milliseconds instead of
an interpreter start and an `import torch` for every rank. A function travels as (module, file, name): the worker loads
the file itself, so functions in test modules can be sent although those modules are on no import path.
"""

import gc
import importlib
import importlib.util
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_WORKERS = 16
# Of a worker, before it looks for groups that nothing uses any more.
MAX_THREADS = 64
# After one rank fails, its peers get this long to fail by themselves before they are killed.
GRACE_S = 5.0
# gloo now and then does not find together, on a busy machine most: then all ranks are started anew.
CONNECT_S = 60.0
CONNECT_TRIES = 3


class WorkerError(AssertionError):
    """At least one rank raised, died or ran out of time; the message carries each rank's traceback."""


@dataclass
class _Worker:
    """One worker process and the parent's end of its socket."""

    process: subprocess.Popen[bytes]
    link: Connection

    def stop(self) -> None:
        self.link.close()
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class GlooPool:
    """Up to `MAX_WORKERS` workers of one thread each; `run` uses the first `world_size` of them.

    Use it through the fixture `gloo`. Not safe to share between threads.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Calls `function(*args)` on `world_size` ranks of a fresh gloo group; returns the results in rank order.

        `function` is a top-level function of any module; `args` and results are pickled. Inside, `torch.distributed`
        is initialised (rank, world size, a FileStore in a fresh folder) and is torn down afterwards.
        Raises `WorkerError` when a rank raises, dies (since the call before, too), or is not done after `timeout_s`; a
        worker that does not come back is replaced, so the next call starts clean. The time begins when all ranks are in
        the group.
        """
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size={world_size} is outside 1..{MAX_WORKERS}")
        while len(self._workers) < world_size:
            self._workers.append(_start_worker())
        self._check_alive()
        address = (function.__module__, sys.modules[function.__module__].__file__, function.__qualname__)
        payload = pickle.dumps(args)
        for _ in range(CONNECT_TRIES):
            folder = tempfile.mkdtemp(prefix="gloo-")
            try:
                for rank, worker in enumerate(self._workers[:world_size]):
                    call = (address, rank, world_size, str(Path(folder, "store")), timeout_s)
                    worker.link.send_bytes(pickle.dumps(call))
                    worker.link.send_bytes(payload)
                if self._are_connected(world_size):
                    replies = self._collect(world_size, timeout_s)
                    break
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            raise WorkerError(f"gloo did not connect {world_size} ranks in {CONNECT_TRIES} tries of {CONNECT_S:g} s")
        failures = [(rank, text) for rank, (good, text) in replies.items() if not good]
        if failures:  # dictionaries keep order: the rank that failed first is the likely cause, and comes first
            name = function.__qualname__
            raise WorkerError("".join(f"\n--- rank {rank} of {world_size} in {name} ---\n{t}" for rank, t in failures))
        return [replies[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """Ends every worker."""
        for worker in self._workers:
            worker.process.kill()
            worker.stop()
        self._workers.clear()

    def _check_alive(self) -> None:
        """Raises `WorkerError` where a worker has ended since the last call: another test did it, or what it left."""
        ended = [rank for rank, worker in enumerate(self._workers) if worker.process.poll() is not None]
        if ended:
            codes = {rank: self._replace(rank) for rank in ended}
            raise WorkerError(f"workers died after their last call (exit status by rank: {codes})")

    def _are_connected(self, world_size: int) -> bool:
        """Whether every rank says that it is in the group; if not, all are replaced."""
        deadline = time.monotonic() + CONNECT_S
        for worker in self._workers[:world_size]:
            try:
                if worker.link.poll(max(0.0, deadline - time.monotonic())) and pickle.loads(worker.link.recv_bytes()):
                    continue
            except (EOFError, OSError):
                pass
            for rank in range(world_size):
                self._replace(rank)
            return False
        return True

    def _collect(self, world_size: int, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """Replies by rank, in order of arrival: (True, result) or (False, what went wrong)."""
        deadline = time.monotonic() + timeout_s
        pending = {self._workers[rank].link: rank for rank in range(world_size)}
        replies: dict[int, tuple[bool, Any]] = {}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for link in ready:
                assert isinstance(link, Connection)
                rank = pending.pop(link)
                try:
                    replies[rank] = pickle.loads(link.recv_bytes())
                except (EOFError, OSError):
                    code = self._replace(rank)
                    replies[rank] = (False, f"the worker process died (exit status {code})\n")
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in pending.values():
            self._replace(rank)
            replies[rank] = (False, f"did not finish (limit {timeout_s:g} s, {GRACE_S:g} s after a peer's failure)\n")
        return replies

    def _replace(self, rank: int) -> int | None:
        """Ends a worker and starts another in its place; returns the old one's exit status."""
        old = self._workers[rank]
        old.stop()
        self._workers[rank] = _start_worker()
        return old.process.returncode


def _start_worker() -> _Worker:
    parent, child = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, str(child.fileno()), str(os.getpid())]
    process = subprocess.Popen(command, pass_fds=[child.fileno()], env=environment, stdin=subprocess.DEVNULL)
    child.close()
    return _Worker(process, Connection(parent.detach()))


def _serve(descriptor: int, parent: int) -> None:
    """The worker: runs one call after another until the other end of the socket closes."""
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    link = Connection(descriptor)
    excepthook = sys.excepthook  # each process group wraps it once more
    while True:
        sys.excepthook = excepthook
        try:
            address, rank, world_size, store, timeout_s = pickle.loads(link.recv_bytes())
            payload = link.recv_bytes()
            with suppress(Exception):  # `_call` meets it again, and replies with it
                _load_module(*address[:2])
            connected = _connect(rank, world_size, store, timeout_s)
            link.send_bytes(pickle.dumps(connected))
            if not connected:
                continue
            try:
                reply = pickle.dumps((True, _call(address, payload)))
            except BaseException:
                reply = pickle.dumps((False, traceback.format_exc()))
            link.send_bytes(reply)
        except (EOFError, OSError):
            return


def _exit_with(parent: int) -> None:
    """Ends this process when the test session is gone, even if killed while this worker was stuck in a collective."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _connect(rank: int, world_size: int, store: str, timeout_s: float) -> bool:
    """Join the group of a call; False where gloo fails to."""
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(timeout_s, CONNECT_S)),
        )
    except RuntimeError:
        return False
    return True


def _call(address: tuple[str, str, str], payload: bytes) -> Any:
    """The function's result; the group is left afterwards."""
    import torch.distributed as dist

    library = _library()
    try:
        module, file, name = address
        function: Any = _load_module(module, file)
        for part in name.split("."):
            function = getattr(function, part)
        result = function(*pickle.loads(payload))
        assert _library() == library, "matrix products are another library's now: later tests would see other bits"
        return result
    finally:
        dist.destroy_process_group()
        _forget_meshes()
        # Groups hang in cycles, each with threads that poll: a thousand of them take more time than the tests.
        if len(os.listdir("/proc/self/task")) > MAX_THREADS:
            gc.collect()


def _library() -> str:
    """Which library multiplies matrices in this process (see kernels/products.py)."""
    import torch

    return str(torch.backends.mkldnn.matmul.fp32_precision)


def _forget_meshes() -> None:
    """Drops what DTensor keeps of its decisions: it holds the meshes, and they their groups."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor._collective_utils import MeshTopoInfo
        from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()
        MeshTopoInfo.build_from_mesh.cache_clear()
        clear_redistribute_planner_cache()


def _load_module(name: str, file: str) -> ModuleType:
    """The module `name`, imported by name or, for a test module, from its file under the name it has in the parent.

    First without a group: what exists when a module is first loaded is never collected.
    """
    if name in sys.modules:
        return sys.modules[name]
    try:
        return _import(name, file)
    finally:
        gc.collect()
        gc.freeze()  # what modules hold stays: no later collection need look at it again


def _import(name: str, file: str) -> ModuleType:
    root = Path(__file__).parent
    if root not in Path(file).parents:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    parent, _, _ = name.rpartition(".")
    while parent:  # unpickling imports them first
        sys.modules.setdefault(parent, ModuleType(parent))
        parent, _, _ = parent.rpartition(".")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
