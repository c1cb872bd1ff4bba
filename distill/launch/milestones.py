"""A process beside the ranks that writes the students of milestones (``checkpoint.export``), so that training does not wait for it.

It looks for new milestones, and ends at once when the launcher ends or is gone: what it was at is not there, since a
milestone appears complete or not at all. What is left is written after training, or beside the next start.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.launch.trackers import close_input, start_beside, wait_or_kill
from distill.runfolder.events import Event, note

if TYPE_CHECKING:
    from distill.recipe.keys import CheckpointSpec

LOOK_EVERY_S = 2.0
NAME = "milestones"  # of the text of its output
END_S = 5.0  # for a process that ends as soon as its standard input does
CODE = "import sys; from distill.launch.milestones import follow; follow(*sys.argv[1:])"


@contextmanager
def exporting(run_folder: Path, checkpoint: "CheckpointSpec") -> Iterator[None]:
    """Writes students of milestones while inside, where the recipe wants that."""
    process = start_beside(CODE, run_folder, NAME) if checkpoint.export else None
    try:
        yield
    finally:
        if process is not None:
            close_input(process)
            wait_or_kill(process, END_S)


def follow(run_folder: str, name: str) -> None:  # noqa: ARG001  # as every process beside the ranks
    """Is the process: writes milestones as they come, until standard input is closed."""
    from distill.evaluate.milestones import LEFT_MESSAGE, MilestoneWriter

    os.nice(10)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    writer = MilestoneWriter(Path(run_folder), print_line)
    try:
        while True:
            writer.write_left()
            time.sleep(LOOK_EVERY_S)
    except BaseException as error:  # the launcher tries again after training
        lines = str(error).strip().splitlines() or [type(error).__name__]
        note(Path(run_folder), Event("failed", f"{LEFT_MESSAGE} beside training: {lines[0]}"))
        raise


def print_line(text: str) -> None:
    """Appends a line to the text of the process."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _end_with_launcher() -> None:
    sys.stdin.buffer.read()
    os._exit(0)
