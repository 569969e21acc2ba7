"""How many bytes optimizers keep."""

from collections.abc import Iterable
from dataclasses import dataclass

from .sharded import Optimizer, local_part


@dataclass(frozen=True)
class StateSize:
    """Bytes of optimizer state, counters aside.

    Attributes:
        here: on this rank.
        whole: of the parameters that these optimizers update, each counted once, wherever it lies.
    """

    here: int
    whole: int


def state_size(optimizers: Iterable[Optimizer]) -> StateSize:
    """The size of all state."""
    tensors = [tensor for optimizer in optimizers for tensor in optimizer.state().values() if tensor.ndim]
    return StateSize(
        sum(local_part(tensor).nbytes for tensor in tensors),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )
