"""One job at a time in a run folder, also while the ranks of a killed launcher are still ending.

The launcher takes the lock alone to prepare the folder, then shares it with its ranks. The system lets
go of it when a process ends, however it ends. The file lies beside the real folder, which ``--fresh``
empties: a link to it, or another way to write its name, leads to the same file. Without a run folder it
does not stay either.

A file system without locks (Lustre without ``flock``, some in user space) does not keep a job from starting. There the
heartbeats of ranks show that another job is at work, but not one that is still being prepared.
"""

import errno
import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distill.errors import UserError
from distill.runfolder.heartbeat import BEAT_S, last_beat_unix

WAIT_S = 30.0  # ranks whose launcher is gone end within a second, unless their disk hangs
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP})  # of such
BEATS_S = 3 * BEAT_S  # in which a rank that runs writes its record
logger = logging.getLogger(__name__)


class RunLock:
    """A process's hold on a run folder."""

    def __init__(self, run_folder: Path) -> None:
        real = Path(os.path.realpath(run_folder))
        self._run_folder, self._path = run_folder, real.with_name(f".{real.name}.lock")
        self._made_parent, self._lack = not self._path.parent.exists(), ""
        try:
            self._file = self._open()
        except OSError as error:
            raise UserError(
                f"{self._path}: the lock of {run_folder} cannot be written ({error.strerror})",
                fix="Use a run folder inside a folder that you may write to.",
            ) from error

    def alone(self, wait_s: float = WAIT_S) -> None:
        """Waits until no other process works in the folder.

        Raises:
            UserError: another one still does.
        """
        deadline = time.monotonic() + wait_s
        while True:
            if self._try(fcntl.LOCK_EX) and not (self._lack and _is_beating(self._run_folder)):
                if self._lack:
                    logger.warning(
                        "%s: no locks here (%s); until its ranks run, another job that starts in it is not noticed",
                        self._run_folder,
                        self._lack,
                    )
                if not self._was_removed():
                    return
            elif time.monotonic() > deadline:
                raise UserError(
                    f"{self._run_folder}: another job is at work in it",
                    fix="Wait for it or stop it, or give this one another --name.",
                )
            else:
                time.sleep(0.1)

    def share(self) -> None:
        """Lets others of the same job in; for a launcher that has prepared the folder, and for its ranks.

        Raises:
            UserError: another job has taken the folder meanwhile.
        """
        if not self._try(fcntl.LOCK_SH):
            raise UserError(
                f"{self._run_folder}: another job took it over",
                fix="Start one job per run folder, or give this one another --name.",
            )

    def close(self) -> None:
        """Lets go. Where the run folder was not made the file goes too: a start that was refused leaves nothing."""
        if not os.path.lexists(self._run_folder) and self._try(fcntl.LOCK_EX):
            self._path.unlink(missing_ok=True)
            if self._made_parent:
                with suppress(OSError):  # other runs are in it
                    self._path.parent.rmdir()
        self._file.close()

    def _open(self) -> IO[str]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.open("w")

    def _was_removed(self) -> bool:
        """Another process removed the file after this one had opened it; then it is opened anew."""
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return False
        self._file.close()
        self._file = self._open()
        return True

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._lack = error.strerror or str(error)
        return True


def _is_beating(run_folder: Path) -> bool:
    """A rank writes its record."""
    before = last_beat_unix(run_folder, math.inf)
    time.sleep(BEATS_S if before else 0.0)
    return last_beat_unix(run_folder, before) > before


@contextmanager
def run_lock(run_folder: Path) -> Iterator[RunLock]:
    """A hold on a run folder, let go of at the end; nothing is held before ``alone`` or ``share``.

    Raises:
        UserError: the file of the lock cannot be made.
    """
    lock = RunLock(run_folder)
    try:
        yield lock
    finally:
        lock.close()
