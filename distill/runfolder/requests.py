"""What people and schedulers ask of a running job: save and stop, or save and go on.

    SIGINT, SIGTERM, SIGHUP, or the file control/stop    every rank saves, then the job ends
    SIGUSR1, or the file control/save                    every rank saves and goes on

A signal to one rank is enough: the ranks agree. The launcher passes its signals on as files, so
that a rank that is still starting, or is started again, finds them too.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP, SAVE = "stop", "save"
Handler = Callable[[int, FrameType | None], object]


def leave_request(run_folder: Path, request: str) -> None:
    """Leaves a request (``STOP`` or ``SAVE``) for the ranks."""
    folder = run_folder / "control"
    folder.mkdir(exist_ok=True)
    (folder / request).touch()


def forget(run_folder: Path) -> None:
    """Removes the requests of an earlier launch."""
    for request in (STOP, SAVE):
        (run_folder / "control" / request).unlink(missing_ok=True)


def is_requested(run_folder: Path, request: str) -> bool:
    """The request was left."""
    return (run_folder / "control" / request).exists()


@contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handles signals so while inside; SIGHUP stays ignored where ``nohup`` or a shell has that so."""
    before = {}
    for signum, handler in handlers.items():
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


class StopSaveRequests:
    """What this rank was requested to do; set by signals and files, read by the loop at its logging interval."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._stops = self._saves = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests; a repeat changes nothing."""
        handlers = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
            signal.SIGHUP: self._stop,
            signal.SIGUSR1: self._save,
        }
        with handling(handlers):
            yield

    def look(self) -> None:
        """Takes up what was left in files."""
        self._stops = self._stops or is_requested(self._run_folder, STOP)
        save = self._run_folder / "control" / SAVE
        if save.exists():
            self._saves = True
            save.unlink(missing_ok=True)

    def to_stop(self) -> bool:
        """The job is to save and end."""
        return self._stops

    def take_save(self) -> bool:
        """A save was requested since the last call."""
        taken, self._saves = self._saves, False
        return taken

    def _stop(self, *_: object) -> None:
        self._stops = True

    def _save(self, *_: object) -> None:
        self._saves = True
