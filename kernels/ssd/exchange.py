"""What an operator over segments asks of whoever carries states between them."""

from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """An exchange under way."""

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for, so that no work need be put before what waits."""
        ...

    def wait(self) -> list[Tensor | None]:
        """The state `(B, H, P, N)` that arrives at each segment, None where nothing does."""
        ...


class Exchange(Protocol):
    """Turns what segments do to a state into the states that enter them, wherever the segments are."""

    def start(self, M: list[Tensor], S: list[Tensor], *, reverse: bool = False) -> Pending:
        """Begin with the summaries of this process's segments: `M` of shape `(B, H)`, `S` of shape `(B, H, P, N)`.

        With `reverse`, gradients travel from the last segment to the first.
        """
        ...
