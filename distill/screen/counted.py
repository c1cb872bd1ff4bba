"""Bars that count what is done."""

from collections.abc import Callable
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.screen.console import make_console


class ProgressBar:
    """A progress bar on standard error with counts and the time left."""

    def __init__(self, what: str) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=make_console(to_stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows the bar from the first count on: what is refused before has its line alone."""
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total)


class Bars(ExitStack):
    """One progress bar after the other."""

    def __call__(self, what: str) -> Callable[[int, int], None]:
        self.close()
        return self.enter_context(ProgressBar(what))
