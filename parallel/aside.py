"""Work that may never end, done beside the thread that needs it: file systems, pipes and devices hang."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """Work that a daemon thread begins now; it keeps no process alive, and nothing it raises gets out.

    Args:
        work: takes as long as it likes.

    Attributes:
        results: what `work` returned, once it did.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.results: list[T] = []
        self._work, self._problem = work, ""
        self._thread = threading.Thread(target=self._do, name="headrace_aside", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> str:
        """Wait at most so long; what went wrong, in few words, and nothing once the work is done."""
        self._thread.join(max(0.0, seconds))
        return "no answer yet" if self._thread.is_alive() else self._problem

    def _do(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as error:
            self._problem = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def within(seconds: float, work: Callable[[], T], default: T) -> T:
    """What `work` returns, or `default` where it fails or takes longer."""
    aside = Aside(work)
    return default if aside.wait(seconds) else aside.results[0]
