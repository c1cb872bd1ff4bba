"""Where an image's bytes lie, and how to get them: a file, a stretch of a tar file, a row of a Parquet file.

Nothing is ever extracted: a member of a tar file is a name to show and a stretch to read.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.listing.limit import BlockedError, LimitedCalls
from distill.listing.storage import Storage, read_file, read_stretch

IMAGE_COLUMNS = (
    "image",
    "jpg",
    "img",
    "jpeg",
    "png",
    "webp",
)  # of a table, the first that is there
T = TypeVar("T")
OPEN_GROUPS = 4  # row groups kept in memory by one reader: a random row costs its full group


class Kind(IntEnum):
    """What holds an image."""

    FILE = 0
    TAR = 1
    PARQUET = 2


@dataclass(frozen=True)
class Location:
    """One encoded image.

    ``container`` is the folder that ``name`` is relative to, or the tar or Parquet file. ``offset``
    and ``length`` are bytes of a tar file; row group and row of a Parquet file.
    """

    kind: Kind
    container: str
    name: str
    offset: int = 0
    length: int = 0

    @staticmethod
    def of(path: Path) -> "Location":
        """A file."""
        return Location(Kind.FILE, str(path.parent), path.name)

    def __str__(self) -> str:
        """What people see: a path, or a file and the name inside."""
        if self.kind is Kind.FILE:
            return self.name if self.name.startswith("/") else f"{self.container}/{self.name}"
        return f"{self.container}:{self.name}"


class Reader:
    """Reads images' bytes, again and again while their storage refuses them; safe from several threads."""

    def __init__(self, storage: Storage | None = None, limit_s: float | None = None) -> None:
        """``storage``: reports what is waited for; without one, warnings do. ``limit_s``: of one attempt to read, which may block for ever without."""
        self._storage = storage or Storage()
        self._limit = None if limit_s is None else LimitedCalls(limit_s)
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = Lock()

    def read(self, location: Location) -> NDArray[np.uint8]:
        """The encoded image.

        Raises:
            BlockedError: reading blocks for longer than the limit.
            OSError: the file is wrong, or its container is shorter than it was.
            StorageError: the storage has refused it for minutes.
        """
        path = str(location) if location.kind is Kind.FILE else location.container
        return self._try_again(path, partial(self._attempt, location))

    def is_gone(self, location: Location) -> bool:
        """What holds the image is not there, neither file nor folder."""
        try:
            self._try_again(location.container, partial(os.stat, location.container))
        except OSError as error:
            return not isinstance(error, BlockedError)
        return False

    def _try_again(self, path: str, attempt: Callable[[], T]) -> T:
        if self._limit is not None:
            attempt = partial(self._limit.run, attempt, path)
        return self._storage.read(path, attempt)

    def _attempt(self, location: Location) -> NDArray[np.uint8]:
        if location.kind is Kind.FILE:
            return np.frombuffer(read_file(str(location)), np.uint8)
        if location.kind is Kind.PARQUET:
            return self._row(location)
        with Path(location.container).open("rb", buffering=0) as file:
            data = read_stretch(file.fileno(), location.offset, location.length)
        if len(data) < location.length:
            raise OSError(f"{location.container} ends before {location.name} does")
        return np.frombuffer(data, np.uint8)

    def _row(self, location: Location) -> NDArray[np.uint8]:
        key = (location.container, location.offset)
        with self._lock:
            if key not in self._groups:
                self._groups[key] = image_column(location.container, location.offset)
            self._groups.move_to_end(key)
            while len(self._groups) > OPEN_GROUPS:
                self._groups.popitem(last=False)
            column = self._groups[key]
        value = column[location.length].as_py()
        if value is None:
            raise OSError(f"{location}: the row holds no image")
        return np.frombuffer(value, np.uint8)


def image_column(path: str, group: int) -> Any:
    """Encoded images of one row group, as a column of binary values.

    Raises:
        OSError: the file is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        name, field = image_field(file.schema_arrow)
        column = file.read_row_group(group, columns=[name]).column(0).combine_chunks()
    except pyarrow.ArrowException as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    return column.field(field) if field else column


def image_field(schema: Any) -> tuple[str, str]:
    """Name of the column that holds images, and of the field inside it where it is a structure.

    Hugging Face data sets have ``image: {bytes, path}``; a plain binary column is taken too. Of several
    columns that may hold images the one with the name of such is taken.

    Raises:
        OSError: there is none, or it is not clear which one.
    """
    from pyarrow import types

    fields: dict[str, str] = {}
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            fields[field.name] = "bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            fields[field.name] = ""
    named = [name for wanted in IMAGE_COLUMNS for name in fields if name.lower() == wanted]
    if named:
        return named[0], fields[named[0]]
    others = [name for name in fields if name != "label"] or list(fields)
    if len(others) == 1:
        return others[0], fields[others[0]]
    if others:
        raise OSError(
            f"which column holds the images: {', '.join(others)}? Name that one image, or leave the others away"
        )
    raise OSError(f"no column of images among {', '.join(schema.names)}")
