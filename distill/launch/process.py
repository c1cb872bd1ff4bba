"""A process that another one can recognise later: its number alone may be given to a new process."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENDED = frozenset(
    "ZX"
)  # the kernel's letters for a process that has ended and waits to be collected
LOOK_S = 0.5
STATE, START = 0, 19  # of the fields of /proc/PID/stat behind the command's name


@dataclass(frozen=True)
class ProcessMark:
    """Names a process of this host by number and start time; ``start_ticks`` counts clock ticks since the host started."""

    pid: int
    start_ticks: int

    def is_running(self) -> bool:
        """Returns whether this very process still runs."""
        try:
            fields = _stat_fields(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:  # of the caller, such as too many open files
            return True
        return fields[STATE] not in ENDED and int(fields[START]) == self.start_ticks


def this_process() -> ProcessMark:
    """Returns the mark of the calling process."""
    return _mark_of(os.getpid())


def parent_process() -> ProcessMark | None:
    """Returns the mark of the process that started this one; None where it has ended."""
    try:
        return _mark_of(os.getppid())
    except OSError:
        return None


def end_with(others: Sequence[ProcessMark | None], exit_code: int) -> None:
    """Ends the calling process within a second of any of the others, however it waits; a None has ended."""

    def watch() -> None:
        while all(other is not None and other.is_running() for other in others):
            time.sleep(LOOK_S)
        os._exit(exit_code)

    threading.Thread(target=watch, name="end-with", daemon=True).start()


def _mark_of(pid: int) -> ProcessMark:
    return ProcessMark(pid, int(_stat_fields(pid)[START]))


def _stat_fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
