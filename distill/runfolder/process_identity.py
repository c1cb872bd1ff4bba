"""Which process a record is of: a number alone means another process on another host, after a restart, in another container, or later."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

START = 19  # of the fields of /proc/PID/stat behind the command's name: clock ticks since the host started


@dataclass(frozen=True)
class ProcessIdentity:
    """Names one process; empty and zero where the system, or an older record, does not name it."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    def is_visible(self) -> bool:
        """Returns whether a number means the same process here: host, its start and the pid namespace are the caller's."""
        here = this_process_identity()
        same_place = (here.host, here.boot_id, here.pid_namespace)
        return same_place == (self.host, self.boot_id, self.pid_namespace)

    def is_same(self) -> bool:
        """Returns whether the process with the number is the one named: visible, and started at the same time."""
        return bool(self.start_ticks) and self.is_visible() and _start(self.pid) == self.start_ticks


def this_process_identity() -> ProcessIdentity:
    """Returns the identity of the calling process."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no /proc
        boot_id, namespace = "", ""
    pid = os.getpid()
    return ProcessIdentity(socket.gethostname(), boot_id, namespace, pid, _start(pid))


def _start(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[START])
