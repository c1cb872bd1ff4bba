"""Whether the run folder is still there: the folder that the job began in, under the name that it had then.

Who trains into a folder that was deleted or renamed trains for nothing, and no file can show it. So a rank of each
node, and the launcher, hold the folder open and compare it with what its name leads to: another device or inode is
another folder. A server of NFS may show it gone for a moment, hence the limit.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from distill.runfolder.failure import LOST_EXIT_CODE, Failure

GONE_LIMIT_S = 60.0


class FolderPresence:
    """Compares a run folder with itself, again and again."""

    def __init__(
        self,
        run_folder: Path,
        *,
        limit_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``limit_s``: for which it may be gone; ``GONE_LIMIT_S`` by default."""
        self._path, self._clock = run_folder, clock
        self._limit_s = GONE_LIMIT_S if limit_s is None else limit_s
        # held open: an inode that is in use has no second owner, and file systems in user space give it no other number
        self._held = os.open(run_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._gone_since: float | None = None

    def gone_s(self) -> float | None:
        """Looks, and returns for how long the folder has not been found; None while it is there."""
        if self._is_there():
            self._gone_since = None
            return None
        now = self._clock()
        self._gone_since = now if self._gone_since is None else self._gone_since
        return now - self._gone_since

    def look(self) -> Failure | None:
        """Looks, and returns why the job has to end once the folder has been gone for longer than the limit."""
        gone_s = self.gone_s()
        return None if gone_s is None or gone_s < self._limit_s else self.failure(gone_s)

    def wait(self, pause_s: float = 0.25) -> Failure | None:
        """Looks until the folder is there again (None), or has been gone for longer than the limit."""
        while self.gone_s() is not None:
            failure = self.look()
            if failure is not None:
                return failure
            time.sleep(pause_s)
        return None

    def failure(self, gone_s: float) -> Failure:
        """The end of a job whose folder is gone."""
        return Failure(
            "user",
            f"{self._path}: the run folder is gone for {gone_s:.0f} s, deleted or renamed; nothing can be saved in it",
            "Give it its name back, in the place of what is there by now, and the same command goes on from its last "
            "checkpoint; without it the command starts anew.",
            LOST_EXIT_CODE,
        )

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._held)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._held), self._path.stat())
        except OSError:
            return False
