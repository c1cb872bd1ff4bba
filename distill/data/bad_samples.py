"""Samples that could not be used: each is named once in ``bad_samples.jsonl``, and too many of them end the run.

All ranks of a machine append to one file under a lock, and read what others wrote before they add a
name. A file system without locks may give a name twice, nothing worse. The file is for people: no error of
it ends a run, a full disk and a line that is torn neither.
"""

import fcntl
import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from distill.errors import DataError
from distill.runfolder.events import Event, note

FILE = "bad_samples.jsonl"
LOCK_TRIES, LOCK_PAUSE_S = 20, 0.05
ALWAYS_ALLOWED = 8  # draws; a small sample is no estimate of a rate


class BadSamples:
    """Names bad samples and keeps their rate; one per loader, on every rank.

    Args:
        file: where names go; None to keep them in memory only.
        max_fraction: of all draws; above it the run stops.
    """

    def __init__(self, file: Path | None, max_fraction: float) -> None:
        self._file, self._max_fraction = file, max_fraction
        self._known: set[str] = set()
        self._read_bytes, self._is_noted = 0, False
        self._num_draws = self._num_bad = 0

    def add_draws(self, count: int) -> None:
        """Counts samples that were requested."""
        self._num_draws += count

    def add(self, name: str, reason: str) -> None:
        """Counts a draw that met a bad sample, and names the sample if no rank has.

        Raises:
            DataError: the rate is above the allowed one.
        """
        self._num_bad += 1
        if name not in self._known:
            self._known.add(name)
            if self._file is not None:
                self._write(self._file, name, reason)
        if self._num_bad > max(ALWAYS_ALLOWED, self._max_fraction * self._num_draws):
            listed = "" if self._file is None else f" (all are in {self._file})"
            raise DataError(
                f"{name}: cannot be used ({reason}); {self._num_bad:,} of {self._num_draws:,} draws were bad{listed}, "
                f"more than data.max_bad_fraction = {self._max_fraction:g} allows",
                fix="Repair or remove the files, or raise data.max_bad_fraction; the same command goes on from the last checkpoint.",
            )

    def _write(self, path: Path, name: str, reason: str) -> None:
        line = json.dumps({"sample": name, "reason": reason}).encode() + b"\n"
        try:
            with path.open("ab+", buffering=0) as file:
                _lock(file)
                others, is_torn = self._others(file)
                self._known |= others
                if name not in others:
                    file.write(b"\n" * is_torn + line)
                    self._read_bytes = file.tell()
        except OSError as error:
            self._note_once(path, error)

    def _others(self, file: IO[bytes]) -> tuple[set[str], bool]:
        """Names that were written since the last look, and whether the last line was never ended, as after a power cut."""
        file.seek(self._read_bytes)
        data, names = file.read(), set[str]()
        for row in data.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that is torn
                names.add(str(json.loads(row)["sample"]))
        complete = data.rfind(b"\n") + 1
        self._read_bytes += complete
        return names, complete < len(data)

    def _note_once(self, path: Path, error: OSError) -> None:
        if not self._is_noted:
            self._is_noted = True
            reason = error.strerror or str(error)
            text = f"{path}: not every bad sample is named in it ({reason}); they are counted and replaced all the same"
            note(path.parent, Event("storage", f"{socket.gethostname()}: {text}"))


def _lock(file: IO[bytes]) -> None:
    """Takes the lock, if it is to be had within a second; without one, or where there are none, a name may come twice."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # held by another rank, which may be stopped
            time.sleep(LOCK_PAUSE_S)
        except OSError:
            return
        else:
            return


def count_bad(path: Path) -> int:
    """Samples named so far in a run; none where the file cannot be read."""
    with suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0
