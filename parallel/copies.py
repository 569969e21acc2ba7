"""Parameters that several processes hold are the same on all of them, bit for bit: compared by checksums."""

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import UserError
from .heartbeat import name_ranks

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A part of a parameter: its name, where it begins in the whole, and its shape.
Part = tuple[str, tuple[int, ...], tuple[int, ...]]


class CopyCheck:
    """Compares the copies of parameters over all processes. Collective.

    What is a copy follows from what each process holds: the same stretch of the parameter of the same name, whether
    that is replicated over `dp_replicate`, over `tp`, or tied over pipeline stages.

    Args:
        parameters: of this process, by the names they have in the whole model; updated in place.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        mine = ([_part(name, parameter) for name, parameter in self._parameters.items()], platform.node())
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._hosts = {rank: host for rank, (_, host) in enumerate(everyone)}
        holders: dict[Part, list[tuple[int, int]]] = defaultdict(list)
        for rank, (parts, _) in enumerate(everyone):
            for place, part in enumerate(parts):
                holders[part].append((rank, place))
        self._shared = {part: held for part, held in holders.items() if len(held) > 1}
        self._most = max(len(parts) for parts, _ in everyone)

    def check(self, step: int) -> None:
        """Compare after `step`. Reads every parameter once, sends 8 bytes a parameter, and waits for the device.

        Raises:
            UserError: on every process: copies differ; names the first such parameter, and who is in the minority.
        """
        if not self._shared:
            return
        sums = checksums(list(self._parameters.values()))
        mine = torch.cat([sums, sums.new_zeros(self._most - len(sums))])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        found = torch.stack(everyone).tolist()
        broken = {
            part[0]: values
            for part, held in self._shared.items()
            if len(set((values := {rank: found[rank][place] for rank, place in held}).values())) > 1
        }
        if broken:
            raise UserError(self._describe(step, broken), everywhere=True)

    def _describe(self, step: int, broken: Mapping[str, Mapping[int, int]]) -> str:
        name, values = next(iter(broken.items()))
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        ((common, votes), *_) = Counter(values.values()).most_common()
        holders = f"{name_ranks({rank: self._hosts[rank] for rank in values})} hold"
        if 2 * votes > len(values):
            minority = {rank: self._hosts[rank] for rank, value in values.items() if value != common}
            whom = f"{name_ranks(minority)} {'has' if len(minority) == 1 else 'have'} other bits than the rest"
        else:
            whom = "they differ, and there is no majority to tell which is right"
        return (
            f"after step {step}, of the copies of {name}{more} that {holders}, {whom}: memory or arithmetic failed "
            "there; nothing of it was saved: take that machine out and go on from the newest checkpoint"
        )


def checksums(parameters: list[Tensor]) -> Tensor:
    """The sum of each one's bits, read as integers, modulo 2^64: int64 of shape (n,), on their device.

    Any one flipped bit changes it, in whatever order the elements are added.
    """
    sums = []
    for parameter in parameters:
        local = parameter.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        sums.append(local.contiguous().view(WORDS[local.element_size()]).sum(dtype=torch.int64))
    return torch.stack(sums)


def _part(name: str, parameter: Tensor) -> Part:
    if not isinstance(parameter, DTensor):
        return name, (0,) * parameter.ndim, tuple(parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return name, tuple(offset), tuple(shape)
