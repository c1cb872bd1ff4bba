"""Bytes that survive a power cut.

Until it is synced a file may hold anything after a power cut, and until its folder is synced it may
have its old name or none. So the order is always: content, sync of the file, rename, sync of the
folder. Every operation is one call of ``os``, so that tests can die at each. Only this module renames.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError

CHUNK_BYTES = 2**24  # handed over at once; large enough that calls cost nothing


def is_full(error: OSError) -> bool:
    """Whether the disk, or a quota on it, has no room."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Written:
    """What a file holds."""

    sha256: str
    num_bytes: int


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Writes a file, synced, and counts and hashes what goes into it.

    Raises:
        OSError: it could not be written; what is there of it stays.
    """
    digest, num_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                count = os.write(descriptor, left[:CHUNK_BYTES])
                digest.update(left[:count])
                num_bytes += count
                left = left[count:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(digest.hexdigest(), num_bytes)


def read_back(path: Path) -> Written:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Written(digest.hexdigest(), file.tell())


def replace_text(path: Path, text: str) -> None:
    """Writes a file that holds either what it held before or ``text``, at every moment; several processes may."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_file(aside, [text.encode()])
        rename(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the name to write a file or folder under; at the end it is synced and becomes ``path``.

    What was there stays until then, and stays after an error, which removes what was written. One
    process at a time.
    """
    aside = path.with_name(f".{path.name}.part")
    remove(aside)
    try:
        yield aside
        sync(aside)
        if path.is_dir():
            gone = path.with_name(f".{path.name}.gone")
            remove(gone)
            rename(path, gone)
            rename(aside, path)
            remove(gone)
        else:
            rename(aside, path)
    finally:
        remove(aside)


def rename(source: Path, target: Path) -> None:
    """Another name in the same folder; a file of that name is replaced."""
    source.rename(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Syncs a file, or all files and names in and below a folder."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            sync(entry)
    _sync_entry(path)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder."""
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder, and those above it, each synced where it was made; nothing if it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def folder_while(folder: Path) -> Iterator[None]:
    """Makes a folder, and those above it, for what is written inside; after an error those it made go again where nothing is in them.

    Raises:
        UserError: it cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror})",
            fix="Name a folder inside one that you may write to.",
        ) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something else is in it
            for each in missing:
                each.rmdir()
        raise
