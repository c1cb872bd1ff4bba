"""Which process a record is of: a number alone means another process on another host, after a restart, in another container, or later."""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STATE, START = 0, 19  # of the fields of /proc/PID/stat behind the command's name
GONE, UNKNOWN = "", "?"  # beside the kernel's letters
ENDED = frozenset({GONE, "Z", "X"})  # Z and X have ended and wait to be collected


@dataclass(frozen=True)
class ProcessIdentity:
    """Names one process; empty and zero where the system, or an older record, does not name it.

    ``start_ticks`` counts clock ticks from the start of the host to that of the process.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    def state(self) -> str:
        """Reads the kernel's letter ("T" stopped, "Z" ended); "" where it is gone, "?" on another host, in another container or without /proc."""
        if (self.host, self.boot_id, self.pid_namespace) != _here() or not self.boot_id:
            return UNKNOWN
        try:
            fields = _stat_fields(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return GONE
        except OSError:  # of the caller, such as too many open files
            return UNKNOWN
        return fields[STATE] if int(fields[START]) == self.start_ticks else GONE

    def is_here(self) -> bool:
        """Returns whether the number is this very process's on this host: it may get a signal."""
        return self.state() not in {GONE, UNKNOWN}

    def is_running(self) -> bool:
        """Returns whether the process runs, or may run where its state is unknown."""
        return self.state() not in ENDED


def identity_of(pid: int) -> ProcessIdentity:
    """Returns the identity of a process of this host; one that is gone, or any without /proc, has 0 ticks."""
    try:
        start_ticks = int(_stat_fields(pid)[START])
    except OSError:
        start_ticks = 0
    return ProcessIdentity(*_here(), pid, start_ticks)


def this_process() -> ProcessIdentity:
    """Returns the identity of the calling process."""
    return identity_of(os.getpid())


@cache
def _here() -> tuple[str, str, str]:
    """Host, start of the host and pid namespace of the calling process: where a number means the same."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no /proc
        boot_id, namespace = "", ""
    return socket.gethostname(), boot_id, namespace


def _stat_fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
