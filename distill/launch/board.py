"""The board of a node: a folder in its memory in which its ranks leave their heartbeats; no other node reads it.

    ranks of one machine        the folder that the launcher made for them
    ranks of another launcher   a folder that all ranks of one launch and one node find by the same name

A node is where process numbers mean the same: one host, one start of it, one container.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from distill.engine.join import MeetingPlace
from distill.errors import SetupError
from distill.job.prepare import launch_of
from distill.runfolder.heartbeat import HeartbeatRecord, last_beat_unix, read_records
from distill.runfolder.process_identity import ENDED, this_process

MEMORY = Path("/dev/shm")  # the folder is this user's, and only they can enter it
FAILED = "failed"  # a file: the job has failed, ranks that do not notice are to end
GONE = "gone"  # a file: the run folder is gone for too long, with the line for people; all ranks are to end
PREFIX = "distill-"
MOST_RANKS = 2**31
SILENT_S = 86400.0  # of ranks in another container, whose processes cannot be looked up


def board_of(run_folder: Path, store: MeetingPlace, *, has_launcher: bool) -> Path:
    """Returns the board of this process's node, which is there from now on.

    Raises:
        SetupError: another user has a folder with its name.
    """
    if has_launcher:
        assert isinstance(store, str), "the launcher of one machine gives a path"
        return Path(store).parent
    here = this_process()
    parts = (launch_of(run_folder), str(run_folder.resolve()), here.host, here.boot_id)
    key = hashlib.sha256("\0".join((*parts, here.pid_namespace)).encode()).hexdigest()[:24]
    memory = MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    board = memory / f"{PREFIX}{os.getuid()}-{key}"
    board.mkdir(mode=0o700, exist_ok=True)
    found = board.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or board.is_symlink():
        raise SetupError(
            f"{board}: belongs to another user, or others can enter it",
            fix="Remove it and run the same command again.",
        )
    return board


def leave_board(board: Path) -> None:
    """Removes a board of another launcher's ranks where every rank on it has ended."""
    if all(record.end or not record.process.is_running() for record in all_records(board)):
        shutil.rmtree(board, ignore_errors=True)


def sweep_boards(board: Path) -> None:
    """Removes what killed launches of this user left beside a board: their processes are gone, or of a container and silent for long."""
    for other in board.parent.glob(f"{PREFIX}{os.getuid()}-*"):
        records = [] if other == board else all_records(other)
        states = {record.process.state() for record in records}
        last_unix = last_beat_unix(other, math.inf)
        if states and (states <= ENDED or time.time() - last_unix > SILENT_S):
            shutil.rmtree(other, ignore_errors=True)


def all_records(board: Path) -> list[HeartbeatRecord]:
    """Every record on a board."""
    return read_records(board, MOST_RANKS)
