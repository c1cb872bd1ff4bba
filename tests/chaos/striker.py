"""Inside the processes of a job: counts its operations on the disk by moment, and ends all of them before the n-th of one.

Loaded by a ``sitecustomize.py`` that ``moments`` puts on the path, so it imports the standard library only.

    STRIKE_RUN      the run folder
    STRIKE_LOG      a file for every operation, to count them; or
    STRIKE_MOMENT   and STRIKE_AT, the operation before which the process group is killed, once: it leaves STRIKE_MARK
    STRIKE_FIRST    a file: a rank that writes metrics of the last phase dies first, and leaves it
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
# By the first part of a path in the run folder; longer ones first
MOMENTS = {
    "data": "index",
    "job": "preparation",
    "recipe": "preparation",
    "teacher.resolved": "preparation",
    "plan": "preparation",
    "env": "preparation",
    "licences": "preparation",
    "control": "preparation",
    "timing": "preparation",
    "teacher": "between phases",
    "anchors": "between phases",
    "checkpoints": "saving",
    "heads": "head fitting",
    "metrics/heads": "head fitting",
    "students": "export",
    "features": "picture",
    "summary": "scoring",
    "failure": "restart",
    "logs": "restart",
}


def moment_of(path: str) -> str:
    """The moment in which a job writes a file of its run folder, empty for one that it writes all the time."""
    name = path.lstrip(".")
    found = [prefix for prefix in MOMENTS if name.startswith(prefix)]
    return MOMENTS[max(found, key=len)] if found else ""


class Striker:
    """Hears of every operation by the interpreter's audit."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._run, self._log = environment["STRIKE_RUN"], environment.get("STRIKE_LOG")
        self._moment = environment.get("STRIKE_MOMENT", "")
        self._at = int(environment.get("STRIKE_AT", "0"))
        self._mark, self._first = (
            environment.get("STRIKE_MARK", ""),
            environment.get("STRIKE_FIRST"),
        )
        self._is_busy = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self._is_busy:
            return
        try:
            path = os.fspath(arguments[0])
            path = os.path.abspath(path if isinstance(path, str) else os.fsdecode(path))  # noqa: PTH100
        except (TypeError, ValueError):
            return
        if not path.startswith(self._run + os.sep):
            return
        path = path[len(self._run) + 1 :]
        moment = moment_of(path)
        if event == "open" and not self._writes(arguments):
            # the launcher reads students again when it scores them; other reads change nothing
            if moment != "export" or os.getpid() != os.getpgrp():
                return
            moment = "scoring"
        self._is_busy = True
        try:
            self._count(event, path, moment)
        finally:
            self._is_busy = False

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        if isinstance(mode, str):
            return any(letter in mode for letter in "wax+")
        return bool(flags & (os.O_WRONLY | os.O_RDWR))

    def _count(self, event: str, path: str, moment: str) -> None:
        if self._log is not None:
            line = f"{moment}\t{event}\t{os.getpid()}\t{path}\n".encode()
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line)
            os.close(descriptor)
            return
        if self._first and not os.path.exists(self._first):  # noqa: PTH110
            if path.startswith("metrics/plain"):
                Path(self._first).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return
        if moment != self._moment or os.path.exists(self._mark):  # noqa: PTH110
            return
        # over all processes of the job: each operation adds a byte
        descriptor = os.open(f"{self._mark}.count", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        count = os.fstat(descriptor).st_size
        os.close(descriptor)
        if count >= self._at:
            Path(self._mark).write_text(f"{moment} {count} {event} {path}")
            os.killpg(os.getpgrp(), signal.SIGKILL)


def install() -> None:
    if "STRIKE_RUN" in os.environ:
        sys.addaudithook(Striker(dict(os.environ)).hear)
