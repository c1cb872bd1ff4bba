"""Members of WebDataset tar shards, walked header by header.

Members that are no regular files (links, devices) are passed over, extended headers are read up to a limit,
and no name is ever used as a path.
"""

import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from distill.errors import DataError
from distill.listing.labels import MAX_LABEL, clean_label
from distill.listing.locations import Kind, Location
from distill.listing.passed_over import PassedOver, reason_of, suffix_reason

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_HEADER = 64 * 1024  # bytes of an extended header; longer ones are no names
NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LABEL = ".cls"


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty where there is no dot."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot else ""


def list_members(
    path: Path, suffixes: Collection[str], passed_over: PassedOver
) -> list[tuple[Location, str | None]]:
    """Images of one shard and the texts of their ``.cls`` members: None without such a member, empty where it holds no name of a class.

    Raises:
        DataError: two members give one image different labels.
        OSError: the file is damaged.
    """
    images: list[tuple[str, Location]] = []
    labels: dict[str, str] = {}
    origins: dict[str, str] = {}
    with path.open("rb") as file:
        for name, offset, length in _members(file, passed_over):
            *folders, last = [part for part in name.split("/") if part not in ("", ".", "..")] or [
                ""
            ]
            suffix = suffix_of(last)
            if reason := reason_of(folders, last):
                passed_over.reasons[reason] += 1
            elif suffix in suffixes:
                key = _key(name, suffixes)
                images.append((key, Location(Kind.TAR, str(path), name, offset, length)))
            elif suffix == LABEL:
                label = _read_label(file, offset, length)
                if not label:
                    passed_over.remarks.append(f"{path}: {name} holds no name of a class")
                key = _key(name, suffixes)
                if labels.setdefault(key, label) != label:
                    raise DataError(
                        f"data.sources: {path}: {key} has two labels, {labels[key]!r} ({origins[key]}) and {label!r} ({name})",
                        fix="Keep one of the two members.",
                    )
                origins[key] = name
            else:
                passed_over.reasons[suffix_reason(suffix)] += 1
    return [(location, _find(key, labels)) for key, location in images]


def _read_label(file: BinaryIO, offset: int, length: int) -> str:
    if length > MAX_LABEL:
        return ""
    file.seek(offset)
    return clean_label(file.read(length).decode("utf-8", "surrogateescape"))


def _find(key: str, labels: dict[str, str]) -> str | None:
    """The label of a key, or of what stands before one of its dots: ``a.mask.png`` belongs to ``a.cls``, as in WebDataset."""
    folder, slash, last = key.rpartition("/")
    parts = last.split(".")
    for length in range(len(parts), 0, -1):
        label = labels.get(folder + slash + ".".join(parts[:length]))
        if label is not None:
            return label
    return None


def _key(name: str, suffixes: Collection[str]) -> str:
    """The sample of a member: ``a/img.v1.0.jpg`` and ``a/img.v1.0.cls`` are ``a/img.v1.0``, up to the first part that is a suffix known here."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    first, *parts = last.split(".")
    for part in parts:
        if f".{part.lower()}" in suffixes or f".{part.lower()}" == LABEL:
            break
        first += f".{part}"
    return folder + slash + first


def _members(file: BinaryIO, passed_over: PassedOver) -> Iterator[tuple[str, int, int]]:
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
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
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
            elif not header.isdir():
                passed_over.reasons["link or device in a shard"] += 1


def _long_name(kind: bytes, payload: bytes) -> str:
    """The name in an extended header; of a pax header the record ``path``."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
    for line in payload.split(b"\n"):
        _, _, record = line.partition(b" ")
        key, _, value = record.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return ""
