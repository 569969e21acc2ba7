"""Which updates choose a new basis, known on the host without asking the device in between."""

import torch


class RefreshClock:
    """Counts updates that were not skipped, on the device, and says when the `period`-th of them is next.

    The host reads the count only where an update may be due: with a period of T that is twice in T updates, once
    before choosing a basis and once after, to learn whether that update was skipped; a period of 1 asks every time.

    Args:
        period: updates between two bases; None for one basis, chosen before the first update.
        device: where the count lives.
    """

    def __init__(self, period: int | None, device: torch.device) -> None:
        self.period = period
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self._read = 0
        self._since = 0
        self._is_known = False

    def next(self) -> tuple[int, bool]:
        """The number of the basis that the coming update uses, and whether it is the first to use it."""
        # True counts lie between what was read and as many more as updates were asked for since.
        if not self._is_known or self._may_be_due():
            self._read, self._since, self._is_known = int(self.count), 0, True
        number, age = (0, self._read) if self.period is None else divmod(self._read, self.period)
        self._since += 1
        return number, age == 0

    def forget(self) -> None:
        """The count was loaded anew: what was read of it holds no more."""
        self._is_known = False

    def age(self, number: int) -> torch.Tensor:
        """Updates so far in the basis of that number, on the device, float64."""
        return self.count.double() - number * (self.period or 0)

    def _may_be_due(self) -> bool:
        if self.period is None:
            return self._read == 0
        age = self._read % self.period
        return age == 0 or age + self._since >= self.period
