"""A process that another one can recognise later: its number alone may be given to a new process."""

import os
from dataclasses import dataclass
from pathlib import Path

ENDED = frozenset(
    "ZX"
)  # the kernel's letters for a process that has ended and waits to be collected
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
    return ProcessMark(os.getpid(), int(_stat_fields(os.getpid())[START]))


def _stat_fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
