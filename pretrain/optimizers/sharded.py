"""The view of a parameter that elementwise optimizers work on: this rank's own part."""

from typing import Protocol

import torch
from torch.distributed.tensor import DTensor


class Optimizer(Protocol):
    """What the training loop and the checkpoint ask of an optimizer."""

    def step(self, lr_scale: float, skip: torch.Tensor) -> None:
        """Apply the gradients with the peak learning rate times `lr_scale`.

        `skip` is a float32 scalar on the device, the same on every rank; where it is 1 nothing changes, state included.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """The state by `<slot>.<parameter name>`, sharded as the parameters are; loading writes into it."""


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`local` as a tensor of `parameter`'s global shape and placement, sharing its memory."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
