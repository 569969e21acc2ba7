"""How the rows of a parameter are cut into blocks, wherever its shards begin and end."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of `block_size` columns, counted from column 0 of the whole parameter; the last of a row may be shorter.

    So a block is the same under every layout. Where the columns of a parameter are cut inside a block, its parts lie on
    several ranks, and its scale is found by `block_maxima` and a maximum over those.

    Attributes:
        width: columns of the whole parameter.
        block_size: columns of a block.
        first: the whole parameter's column that is this part's first.
        columns: columns of this part.
        scale_column: where this part's first block stands in the rows of its scales.
    """

    width: int
    block_size: int
    first: int
    columns: int
    scale_column: int

    @classmethod
    def whole(cls, width: int, block_size: int) -> "BlockGrid":
        """The grid of a parameter that is not cut along its columns."""
        return cls(width, block_size, 0, width, 0)

    @property
    def offset(self) -> int:
        """Columns of the first block that lie on the rank before."""
        return self.first % self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks that this part has columns of."""
        return -(-(self.offset + self.columns) // self.block_size)

    @cached_property
    def pieces(self) -> tuple[tuple[slice, slice, int], ...]:
        """Runs of blocks that are equally wide here: their columns, the columns of their scales, columns of a block."""
        found: list[list[int]] = []  # first column, first block, blocks, columns of a block
        column = 0
        for block in range(self.num_blocks):
            end = min((block + 1) * self.block_size - self.offset, self.columns)
            if found and found[-1][3] == end - column:
                found[-1][2] += 1
            else:
                found.append([column, block, 1, end - column])
            column = end
        return tuple(
            (
                slice(column, column + blocks * wide),
                slice(self.scale_column + block, self.scale_column + block + blocks),
                wide,
            )
            for column, block, blocks, wide in found
        )
