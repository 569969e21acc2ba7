"""A copy of a rank's tensors in host memory, so that training goes on while they are written."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ...errors import UserError

MEMORY = "/proc/meminfo"
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class HostCopy:
    """This rank's part of every tensor in memory of its own, which serves one save after another.

    Pinned where the tensors are on a GPU, and touched once, so that no save pays for it.

    Args:
        tensors: by name, DTensors or plain ones.
        processes_here: how many processes of this machine do the same.
        needed_by: the setting that asks for it, and what turns it off.

    Raises:
        UserError: there is not enough memory.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        processes_here: int = 1,
        needed_by: tuple[str, str] = ("checkpoint.asynchronous=true", "checkpoint.asynchronous=false"),
    ) -> None:
        self._sources = dict(tensors)
        locals_ = {name: _local(tensor) for name, tensor in tensors.items()}
        self.num_bytes = sum(local.numel() * local.itemsize for local in locals_.values())
        _check_memory(self.num_bytes * processes_here, needed_by)
        self.tensors = {
            name: torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            for name, local in locals_.items()
        }
        for copy in self.tensors.values():
            copy.reshape(-1).view(torch.uint8).fill_(0)
        on_gpu = [local.device for local in locals_.values() if local.is_cuda]
        self._copied = torch.cuda.Event() if on_gpu else None
        self._device = on_gpu[0] if on_gpu else None

    @torch.no_grad()
    def take(self) -> None:
        """Copy what the tensors hold now. On a GPU this is queued behind the work given so far, ahead of all later."""
        for name, source in self._sources.items():
            self.tensors[name].copy_(_local(source), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the copy is there. Any thread may."""
        if self._copied is not None:
            self._copied.synchronize()

    @torch.no_grad()
    def put_back(self) -> None:
        """Fill the tensors with what the copy holds."""
        for name, source in self._sources.items():
            _local(source).copy_(self.tensors[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def available_memory() -> int | None:
    """Bytes of memory that this process could still get; None where that is not known (not Linux).

    What the machine has free, or less where a cgroup, as slurm makes one for each job, allows less.
    """
    try:
        with open(MEMORY) as file:
            fields = dict(line.split(":", 1) for line in file)
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *cgroup_room()])
    except (OSError, KeyError, ValueError):
        return None


def cgroup_room() -> Iterator[int]:
    """Bytes that each cgroup above this process could still take, file cache that can go not counted."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, most, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, KeyError, ValueError):  # the root has no limit, and one that says `max` has none
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                taken = int((group / used).read_text()) - int(stat["inactive_file"])
                yield max(0, int((group / most).read_text()) - taken)


def _check_memory(num_bytes: int, needed_by: tuple[str, str]) -> None:
    free = available_memory()
    if free is not None and num_bytes > free:
        raise UserError(
            f"{needed_by[0]} needs {num_bytes / 1e9:,.1f} GB of memory on this machine for a copy of "
            f"what is saved, and {free / 1e9:,.1f} GB are free; set {needed_by[1]}"
        )
