"""Whether the files that an index names are still those that it was made of, by their sizes in bytes.

An image that was edited almost always has another size; one that has not is not noticed.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data.index import ImageIndex
from distill.errors import DataError
from distill.listing.limit import in_order
from distill.listing.locations import Kind, Location
from distill.listing.storage import Storage

THREADS = 16  # a server answers many at once
AT_ONCE = 65_536
GONE = -1


def file_bytes(index: ImageIndex) -> NDArray[np.int64]:
    """Bytes of the file, shard or table that each image lies in, [images]; ``GONE`` where it cannot be found."""
    found, storage = np.empty(len(index), np.int64), Storage()

    @cache
    def of_container(path: str) -> int:
        return _bytes_of(path, storage)

    def of_image(location: Location) -> int:
        is_file = location.kind is Kind.FILE
        return _bytes_of(str(location), storage) if is_file else of_container(location.container)

    ends = [*range(0, len(index), AT_ONCE), len(index)]
    for begin, end in pairwise(ends):
        locations = [index.location(image) for image in range(begin, end)]
        found[begin:end] = list(in_order(of_image, locations, THREADS))
    return found


def refuse_changed(index: ImageIndex, folder: Path, fix: str) -> None:
    """Refuses an index whose images lie in files of other sizes than when it was made; one without sizes passes.

    Args:
        index: of images that lie elsewhere.
        folder: what the line names.
        fix: the next move of who is refused.

    Raises:
        DataError: names the first such image and counts them.
    """
    if index.file_bytes is None:
        return
    now = file_bytes(index)
    changed = np.flatnonzero(now != index.file_bytes)
    if not len(changed):
        return
    first = int(changed[0])
    what = "is gone" if now[first] == GONE else f"has {now[first]:,} bytes"
    raise DataError(
        f"{folder}: {index.location(first)} {what}, it had {index.file_bytes[first]:,} when it was embedded; "
        f"{len(changed):,} of {len(index):,} images lie in changed files",
        fix=fix,
    )


def _bytes_of(path: str, storage: Storage) -> int:
    try:
        return storage.read(path, Path(path).stat).st_size
    except OSError:
        return GONE
