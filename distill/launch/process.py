"""Ends a process with others that it cannot do without."""

import os
import threading
import time
from collections.abc import Sequence

from distill.runfolder.process_identity import ProcessIdentity

LOOK_S = 0.5


def end_with(others: Sequence[ProcessIdentity], exit_code: int) -> None:
    """Ends the calling process within a second of any of the others, however it waits."""

    def watch() -> None:
        while all(other.is_running() for other in others):
            time.sleep(LOOK_S)
        os._exit(exit_code)

    threading.Thread(target=watch, name="end-with", daemon=True).start()
