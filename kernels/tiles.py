"""Tile choices: block sizes, warps and pipeline stages of each kernel, by architecture, read from `tiles.toml`.

Nothing is tuned at run time; `benchmarks/tune.py` writes the table anew.
"""

import re
import tomllib
from functools import cache
from pathlib import Path

Tile = dict[str, int]

_TABLE = Path(__file__).with_name("tiles.toml")


@cache
def tile(kernel: str, arch: str, size: str = "any") -> Tile:
    """Return the tile of `kernel` for a problem of `size` on `arch`.

    An architecture that is not in the table takes what its next older relative has. Raises LookupError when there is
    none.
    """
    by_arch = _table()[kernel]
    nearest = _nearest(arch, tuple(by_arch))
    if nearest is None:
        raise LookupError(f"no tiles for {arch}; known: {', '.join(by_arch)}. Run benchmarks/tune.py on it")
    return dict(by_arch[nearest][size])


def has_tiles(arch: str) -> bool:
    """Whether kernels have tiles on `arch`: it, or an older relative, is in every table."""
    return all(_nearest(arch, tuple(by_arch)) is not None for by_arch in _table().values())


@cache
def _table() -> dict[str, dict[str, dict[str, Tile]]]:
    return tomllib.loads(_TABLE.read_text())


def _nearest(arch: str, known: tuple[str, ...]) -> str | None:
    if arch in known:
        return arch
    if arch == "interpreter":
        return min(known)
    family, number = _split(arch)
    older = [(_split(name)[1], name) for name in known if _split(name)[0] == family and _split(name)[1] <= number]
    return max(older)[1] if older else None


def _split(arch: str) -> tuple[str, int]:
    match = re.fullmatch(r"(sm_|gfx9|gfx1[0-9])([0-9a-f]+)", arch)  # AMD's families differ in the width of a wave
    return (match[1], int(match[2], 16)) if match else (arch, 0)
