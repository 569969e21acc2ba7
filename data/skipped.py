"""Rows that a run leaves out: stretches of the data order, fixed once they are decided on."""

from dataclasses import dataclass

from ..errors import UserError

Stretch = tuple[int, int]


@dataclass(frozen=True)
class SkippedRows:
    """Stretches `[first, end)` of global row numbers that are never trained on, in the order they were decided on.

    With the seed and the next row this is the whole state of the data order.
    """

    stretches: tuple[Stretch, ...] = ()

    @staticmethod
    def read(found: object) -> "SkippedRows":
        """From JSON, a list of pairs.

        Raises:
            UserError: it is none.
        """
        pairs = found if isinstance(found, list) else [found]
        stretches = []
        for pair in pairs:
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(row) is int for row in pair)):
                raise UserError(f"skipped rows {found!r} are no list of pairs [first, end]")
            stretches.append((pair[0], pair[1]))
        return SkippedRows(tuple(stretches))

    def following(self, row: int) -> int:
        """The first row at or after `row` that is not left out."""
        while (end := max((end for first, end in self.stretches if first <= row < end), default=row)) > row:
            row = end
        return row

    def and_also(self, first: int, end: int) -> "SkippedRows":
        """These and `[first, end)`."""
        return SkippedRows((*self.stretches, (first, end)))

    def continues(self, earlier: "SkippedRows") -> bool:
        """Whether these are `earlier` ones and perhaps more."""
        return self.stretches[: len(earlier.stretches)] == earlier.stretches
