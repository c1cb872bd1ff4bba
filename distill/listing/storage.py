"""An error of the system, interpreted: the file is wrong, or the storage that it lies on. What storage refuses is tried again.

    file      no such file, a folder, too long a name, rights that its mode denies     an ``OSError``, at once
    storage   everything else that has a number: EIO, ESTALE, ETIMEDOUT, EMFILE, ...   tried again, then ``StorageError``

Pauses grow from 0.1 s to 30 s, five minutes in all: a server that restarts answers within. A picture whose
storage stutters is thus the same picture, and a run has the bits of one without the fault.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distill.errors import StorageError

# A file is wrong today and tomorrow; of every other number it is not known
OF_FILE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EILSEQ,
        errno.ELOOP,
        errno.ENXIO,  # a socket
        errno.EFBIG,
        errno.EOVERFLOW,
    }
)
# The file's where modes deny it; else an expired ticket or a server that has forgotten its clients
OF_RIGHTS = frozenset({errno.EACCES, errno.EPERM})
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
PATIENCE_S = 300.0  # of pauses and failed attempts in all, for one file
REPORT_AFTER_S = 3.0  # shorter ones are nothing to read about
READ, ENTER = 4, 1  # bits of a mode
T = TypeVar("T")
logger = logging.getLogger(__name__)


def is_of_file(error: OSError, path: str) -> bool:
    """The error means that the file is wrong, not its storage; one without a number is of a decoder or of ours."""
    if error.errno in OF_RIGHTS:
        return _is_denied_by_mode(Path(path))
    return error.errno is None or error.errno in OF_FILE


def _is_denied_by_mode(path: Path) -> bool:
    """The mode of the file, or of the folder that hides it, denies this user."""
    bit = READ
    for each in (path, *path.parents):
        try:
            facts = each.stat()
        except PermissionError:
            bit = ENTER
            continue
        except OSError:
            return False
        groups = {os.getegid(), *os.getgroups()}
        shift = 6 if facts.st_uid == os.geteuid() else 3 if facts.st_gid in groups else 0
        return not facts.st_mode >> shift & bit
    return False


class Storage:
    """Tries again what storage refuses; safe from several threads. Once one has given up, none waits any longer."""

    def __init__(
        self,
        say: Callable[[str], None] = logger.warning,
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``say`` gets lines for people, the fewer the longer it takes; ``mark`` what is waited for whenever that changes, empty at the end."""
        self._say, self._mark = say, mark
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._waited: dict[str, float] = {}
        self._next_report_s = REPORT_AFTER_S

    def read(self, path: str, attempt: Callable[[], T]) -> T:
        """The result of an attempt to read ``path``, which is made again while storage refuses it.

        Raises:
            OSError: the file is wrong.
            StorageError: the storage has refused it for ``PATIENCE_S``.
        """
        waited_s, pause_s = 0.0, FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            try:
                result = attempt()
            except OSError as error:
                if is_of_file(error, path):
                    self._end_wait(path)
                    raise
                waited_s += time.monotonic() - began_s
                reason = os.strerror(error.errno or 0)
                if waited_s >= PATIENCE_S or self._given_up.is_set():
                    self._given_up.set()
                    raise _gave_up(path, reason, waited_s) from error
                self._report(path, reason, waited_s)
                pause_s = min(pause_s, LONGEST_PAUSE_S, PATIENCE_S - waited_s)
                self._given_up.wait(pause_s)
                waited_s, pause_s = waited_s + pause_s, 2 * pause_s
            else:
                self._end_wait(path)
                return result

    def _report(self, path: str, reason: str, waited_s: float) -> None:
        with self._lock:
            self._waited[path] = waited_s
            text = f"waiting for storage: {path} ({reason}), {waited_s:.0f} s"
            self._mark(text)
            if waited_s >= self._next_report_s:
                self._next_report_s = 2 * waited_s
                self._say(text)

    def _end_wait(self, path: str) -> None:
        with self._lock:
            waited_s = self._waited.pop(path, None)
            if waited_s is None or self._waited:
                return
            self._mark("")
            if self._next_report_s > REPORT_AFTER_S:
                self._say(f"storage answers again: {path}, after {waited_s:.0f} s")
            self._next_report_s = REPORT_AFTER_S


def _gave_up(path: str, reason: str, waited_s: float) -> StorageError:
    return StorageError(
        f"{path}: the storage does not give it ({reason}), tried again for {waited_s:.0f} s",
        fix="Look at the storage; the same command goes on from what is saved.",
    )


def read_file(path: str) -> bytes:
    """The content of a regular file; a pipe or a device is refused and not waited for.

    Raises:
        OSError: it cannot be read; every error of the system is one, also behind the first bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            is_folder = stat.S_ISDIR(facts.st_mode)
            raise (
                IsADirectoryError(errno.EISDIR, "a folder", path)
                if is_folder
                else OSError("no regular file")
            )
        return read_stretch(descriptor, 0, facts.st_size)
    finally:
        os.close(descriptor)


def read_stretch(descriptor: int, offset: int, length: int) -> bytes:
    """So many bytes of an open file, fewer only where it ends.

    Raises:
        OSError: they cannot be read.
    """
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
