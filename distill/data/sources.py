"""What a source holds: every image of a folder tree, of WebDataset tar shards, of a list of paths, of Parquet files.

    folder            images below it; or shards, or Parquet files, when it holds no images
    NAME.tar          one shard
    NAME.txt          a path per line, absolute or relative to the list's folder
    NAME.parquet      a column of images
    FOLDER/*.tar      several of these, by a pattern of their names

Labels: the first folder of a path below its folder; the ``.cls`` member of a shard's sample, or the first
folder of its name; the column ``label``. Only names and headers are read here. A tar file is walked header by
header: members that are no regular files (links, devices) are passed over, extended headers are
read up to a limit, and no name is ever used as a path.
"""

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distill.data.locations import Kind, Location, image_field
from distill.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
LIST_SUFFIXES = frozenset({".txt", ".lst"})
BLOCK = tarfile.BLOCKSIZE
MAX_NAME_HEADER = 64 * 1024  # bytes of an extended header; longer ones are no names
NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True)
class Found:
    """One image of a source; ``label`` is empty where it has none."""

    location: Location
    label: str


Lister = Callable[[Path], Iterable[Found]]
"""Takes a file or folder to its images, in an order that depends on names only; bytes are read later, at each ``location``."""


def list_source(source: Path, lister: Lister | None = None) -> list[Found]:
    """Every image of a source, in an order that depends on names only.

    Args:
        source: a file, a folder, or a pattern.
        lister: lists it; None where kind and suffix decide.

    Raises:
        DataError: it is missing, is of no kind known here, or holds no image.
    """
    path = source.absolute()
    if any(mark in path.name for mark in "*?[") and not path.exists():
        return [each for match in expand(path) for each in list_source(match, lister)]
    suffix = path.suffix.lower()
    try:
        if lister is not None and path.exists():
            found = list(lister(path))
        elif path.is_dir():
            found = _list_folder(path)
        elif path.is_file() and suffix in LIST_SUFFIXES:
            found = _list_lines(path)
        elif path.is_file() and suffix in CONTAINERS:
            found = list(CONTAINERS[suffix](path))
        else:
            what = "is not there" if not path.exists() else "is no source of images"
            raise DataError(
                f"data.sources: {source} {what}",
                fix="Give a folder, .tar shards, a .txt list of paths or a .parquet file.",
            )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.sources: {source}: {error}", fix="Repair or remove the file."
        ) from error
    if not found:
        raise DataError(
            f"data.sources: {source} holds no images",
            fix=f"Put images ({', '.join(sorted(SUFFIXES))}) into it or its folders.",
        )
    return found


def expand(pattern: Path) -> list[Path]:
    """What a pattern such as ``web/*.tar`` stands for, sorted.

    Raises:
        DataError: nothing.
    """
    matches = sorted(pattern.parent.glob(pattern.name))
    if not matches:
        raise DataError(
            f"data.sources: {pattern} matches nothing", fix="Look at the pattern and the folder."
        )
    return matches


def _list_folder(folder: Path) -> list[Found]:
    """Images below a folder; where there are none, those in its shards or Parquet files."""
    root = str(folder).rstrip("/")
    images: list[str] = []
    containers: list[str] = []
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        facts = Path(parent).stat()
        if (facts.st_dev, facts.st_ino) in visited:  # a link back up
            folders.clear()
            continue
        visited.add((facts.st_dev, facts.st_ino))
        for name in files:
            suffix = _suffix(name)
            if suffix in SUFFIXES or suffix in CONTAINERS:
                path = f"{parent}/{name}"
                if Path(path).is_file():
                    (images if suffix in SUFFIXES else containers).append(path[len(root) + 1 :])
    if images:
        parts = sorted(name.split("/") for name in images)
        return [
            Found(Location(Kind.FILE, root, "/".join(part)), part[0] if len(part) > 1 else "")
            for part in parts
        ]
    names = sorted(containers)
    return [each for name in names for each in CONTAINERS[_suffix(name)](folder / name)]


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"


def _list_lines(path: Path) -> list[Found]:
    """Images named by the lines of a file; blank lines and lines that begin with # are passed over."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    return [Found(Location(Kind.FILE, str(path.parent), name), "") for name in names]


def list_tar(path: Path) -> Iterator[Found]:
    """Images of one shard. Samples are distinguished by their name up to the first dot, as WebDataset does."""
    images: list[tuple[str, Location]] = []
    labels: dict[str, str] = {}
    with path.open("rb") as file:
        for name, offset, length in _members(file):
            key, suffix = _split_name(name)
            if suffix in SUFFIXES:
                images.append((key, Location(Kind.TAR, str(path), name, offset, length)))
            elif suffix == ".cls" and length <= 64:  # a number or a short name
                file_position = file.tell()
                file.seek(offset)
                labels[key] = file.read(length).decode(errors="replace").strip()
                file.seek(file_position)
    for key, location in images:
        top, slash, _ = location.name.lstrip("./").partition("/")
        yield Found(location, labels.get(key, top if slash else ""))


def _split_name(name: str) -> tuple[str, str]:
    """Sample and suffix of a member: ``a/b.c.jpg`` is ``a/b`` and ``.jpg``."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0], _suffix(last)


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of each regular member.

    Raises:
        OSError: a header is damaged or a member reaches past the end.
    """
    end = os.fstat(file.fileno()).st_size
    position, long_name = 0, ""
    while position + BLOCK <= end:
        file.seek(position)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise OSError(f"damaged header at byte {position:,} ({error})") from error
        data, position = position + BLOCK, position + BLOCK + -(-header.size // BLOCK) * BLOCK
        if header.size < 0 or data + header.size > end:
            raise OSError(f"{header.name!r} reaches past the end of the file")
        if header.type in NAME_TYPES:
            if header.size <= MAX_NAME_HEADER:
                long_name = _long_name(header.type, file.read(header.size)) or long_name
        elif header.type == tarfile.XGLTYPE:
            continue  # holds for no single member
        else:
            name, long_name = long_name or header.name, ""
            if header.isreg():
                yield name, data, header.size


def _long_name(kind: bytes, payload: bytes) -> str:
    """The name in an extended header; of a pax header the record ``path``."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return payload.rstrip(b"\0").decode("utf-8", "replace")
    for line in payload.split(b"\n"):
        _, _, record = line.partition(b" ")
        key, _, value = record.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
    return ""


def list_parquet(path: Path) -> Iterator[Found]:
    """Rows of a Parquet file; needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"data.sources: {path} needs pyarrow",
            fix="pip install pyarrow, or pack it into shards elsewhere.",
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        image_field(file.schema_arrow)
        has_labels = "label" in file.schema_arrow.names
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            labels = [""] * rows
            if has_labels:
                column = file.read_row_group(group, columns=["label"]).column(0).to_pylist()
                labels = ["" if value is None else str(value) for value in column]
            for row, label in enumerate(labels):
                yield Found(Location(Kind.PARQUET, str(path), f"{group}/{row}", group, row), label)
    except pyarrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


CONTAINERS = {".tar": list_tar, ".parquet": list_parquet}
