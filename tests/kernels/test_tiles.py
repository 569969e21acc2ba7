"""Which tiles an architecture takes."""

import pytest

from headrace.kernels.tiles import has_tiles, tile


@pytest.mark.parametrize(
    ("arch", "older"),
    [("sm_89", "sm_80"), ("sm_120", "sm_100"), ("gfx950", "gfx942")],
)
def test_an_unknown_architecture_takes_its_older_relatives(arch: str, older: str) -> None:
    assert has_tiles(arch)
    assert tile("ssd", arch, "n128") == tile("ssd", older, "n128")


@pytest.mark.parametrize("arch", ["sm_75", "gfx90a", "gfx1100"])
def test_an_architecture_without_relatives_is_refused(arch: str) -> None:
    assert not has_tiles(arch)
    with pytest.raises(LookupError, match=f"no tiles for {arch}; known: .*sm_80"):
        tile("ssd", arch, "n128")
