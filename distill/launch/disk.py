"""A disk that is full, as the launcher itself finds it: what cannot be saved cannot be reported through a file on that disk.

rank 0   -> a pipe (memory) -> launcher     the result of every save
launcher -> statvfs                         bytes that are free, every few seconds
launcher -> screen                          one line at once, and again every few minutes while it lasts
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from distill.errors import UserError
from distill.runfolder.status import StatusFile

FULL_BYTES = 2**16  # less than a status, the heartbeats and some events take
LOOK_EVERY_S = 5.0
SAY_EVERY_S = 300.0
LONGEST = 500  # letters of a result: one write to a pipe that nothing else divides


class DiskWatch:
    """Counts the saves that failed, looks how much room is left, and prints what is wrong while it is."""

    def __init__(
        self,
        run_folder: Path,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        """``say`` gets the lines."""
        self._run_folder, self._say, self._clock = run_folder, say, clock
        self._free_bytes = free_bytes or _free_bytes
        self._num_failed, self._failure = 0, ""  # since the last that succeeded
        self._looked_at = self._printed_at = float("-inf")

    def take(self, failure: str) -> None:
        """Counts a save: why it failed, empty where it is complete."""
        self._num_failed = self._num_failed + 1 if failure else 0
        self._failure = failure
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Looks at the disk every few seconds."""
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        try:
            free = self._free_bytes(self._run_folder)
        except OSError:  # the folder is gone, which is found elsewhere
            return
        is_full = free < FULL_BYTES
        if not is_full and not self._num_failed:
            self._printed_at = float("-inf")
        elif now - self._printed_at >= SAY_EVERY_S:
            is_first = self._printed_at == float("-inf")
            self._printed_at = now
            if is_full or not is_first or not self._is_in_status():
                self._say(self._line(free, is_full=is_full))

    def _is_in_status(self) -> bool:
        """The status could still be written, so every screen shows the failure already."""
        with suppress(UserError, OSError):
            status = StatusFile(self._run_folder).read()
            return status is not None and status.message == self._failure
        return False

    def _line(self, free: int, *, is_full: bool) -> str:
        saves = f"{self._num_failed} save{'s' if self._num_failed != 1 else ''} failed"
        last = f" ({self._failure})" if self._failure else ""
        state = "the disk is full" if is_full else "nothing is saved"
        return (
            f"{self._run_folder}: {state}, {free:,} bytes are free; {saves} since the last good one{last}. "
            "Training goes on; make room there, and the next save tries again."
        )


def _free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def send(pipe: Connection, failure: str) -> None:
    """Sends the result of a save to the launcher; one that is gone gets none."""
    with suppress(OSError):
        pipe.send_bytes(failure[:LONGEST].encode())


def receive(pipe: Connection) -> list[str]:
    """Results of saves that have come."""
    results = []
    with suppress(EOFError, OSError):
        while pipe.poll():
            results.append(pipe.recv_bytes().decode(errors="replace"))
    return results
