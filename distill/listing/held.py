"""Arrays of files that are read once and stay in memory, for readers that come back to them."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from numpy.typing import NDArray

from distill.listing.locations import Location


class Held:
    """Arrays by their location: what is ``wanted`` is read once and stays, as long as all take at most ``most_bytes``."""

    def __init__(
        self, read: Callable[[Location], NDArray[Any]], wanted: Iterable[Location], most_bytes: int
    ) -> None:
        self._read, self._left = read, most_bytes
        self._wanted = {_path(each) for each in wanted}
        self._arrays: dict[str, NDArray[Any]] = {}

    def __call__(self, location: Location) -> NDArray[Any]:
        """The array; may be called by several threads for different files."""
        name = _path(location)
        if name in self._arrays:
            return self._arrays[name]
        found = self._read(location)
        if name in self._wanted and found.nbytes <= self._left:
            self._left -= found.nbytes
            self._arrays[name] = found
        return found


def _path(location: Location) -> str:
    return os.path.abspath(str(location))  # noqa: PTH100  # no link is followed
