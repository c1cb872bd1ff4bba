from pathlib import Path

import numpy as np

from distill.listing.held import Held
from distill.listing.locations import Kind, Location


def test_held__reads_once_what_is_wanted_as_long_as_there_is_room() -> None:
    a, b, other = (Location.of(Path(f"/pictures/{name}")) for name in "abc")
    reads: list[str] = []

    def read(location: Location) -> np.ndarray:
        reads.append(location.name)
        return np.zeros(100, np.uint8)

    held = Held(read, [a, b], most_bytes=150)
    for location in (a, a, b, b, other, other):
        assert len(held(location)) == 100
    assert reads == ["a", "b", "b", "c", "c"]


def test_held__a_file_is_the_same_under_any_container() -> None:
    reads: list[str] = []

    def read(location: Location) -> np.ndarray:
        reads.append(location.name)
        return np.zeros(1)

    held = Held(read, [Location(Kind.FILE, "/x", "y/a.png")], 8)
    held(Location(Kind.FILE, "/x", "y/a.png"))
    held(Location(Kind.FILE, "/x/y", "a.png"))
    assert reads == ["y/a.png"]
