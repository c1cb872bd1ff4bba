"""Processes beside the ranks that work on checkpoints, so that training does not wait for them.

One writes the students of milestones (``checkpoint.export``), one scores the students at intervals (``evaluate.every``).
Each looks for new checkpoints, and ends at once when the launcher ends or is gone: what it was at is not there, since a
milestone, and the scores of a step, appear complete or not at all. What is left is done after training, or beside the next start.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.launch.trackers import close_input, start_beside, wait_or_kill
from distill.runfolder.events import Event, note

if TYPE_CHECKING:
    from distill.recipe.keys import Recipe

LOOK_EVERY_S = 2.0
MILESTONES, SCORES = "milestones", "scores"  # and of the texts of their output
END_S = 5.0  # for a process that ends as soon as its standard input does
CODE = "import sys; from distill.launch.milestones import follow; follow(*sys.argv[1:])"


@contextmanager
def exporting(run_folder: Path, recipe: "Recipe") -> Iterator[None]:
    """Writes students of milestones, and scores students, while inside, where the recipe wants that."""
    processes = [start_beside(CODE, run_folder, name) for name in _wanted(recipe)]
    try:
        yield
    finally:
        for process in processes:
            close_input(process)
        for process in processes:
            wait_or_kill(process, END_S)


def _wanted(recipe: "Recipe") -> list[str]:
    from distill.recipe.keys import FamilyRecipe

    names = [MILESTONES] if recipe.checkpoint.export else []
    is_scored = isinstance(recipe, FamilyRecipe) and recipe.evaluate.every is not None
    return [*names, SCORES] if is_scored else names


def follow(run_folder: str, name: str) -> None:
    """Is the process of a name: works on checkpoints as they come, until standard input is closed."""
    os.nice(10)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    work, left_message = _work_of(Path(run_folder), name)
    try:
        while True:
            work()
            time.sleep(LOOK_EVERY_S)
    except BaseException as error:  # the launcher tries again after training
        lines = str(error).strip().splitlines() or [type(error).__name__]
        note(Path(run_folder), Event("failed", f"{left_message} beside training: {lines[0]}"))
        raise


def _work_of(run_folder: Path, name: str) -> tuple[Callable[[], object], str]:
    """What to do again and again, and the message where it fails."""
    if name == SCORES:
        from distill.evaluate import at_intervals

        at_intervals.forget_later(run_folder)
        scorer = at_intervals.IntervalScorer(run_folder, print_line)
        return scorer.score_due, at_intervals.LEFT_MESSAGE
    from distill.evaluate import milestones

    return milestones.MilestoneWriter(run_folder, print_line).write_left, milestones.LEFT_MESSAGE


def print_line(text: str) -> None:
    """Appends a line to the text of the process."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _end_with_launcher() -> None:
    sys.stdin.buffer.read()
    os._exit(0)
