"""The screen of a run: a live panel on a terminal, one plain line per event anywhere else.

    take_snapshot -> render_panel              live: redrawn a few times a second
                  -> Narrator.lines            plain: only what is new since the last snapshot

The same screen serves the process that trains, a second terminal, and a run that ended long ago.
Colours and escape codes are left to rich, which honours NO_COLOR and writes none to a file.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from distill.runfolder.status import FINAL_STATES, Status
from distill.screen.console import printable
from distill.screen.ending import ending_box, ending_of
from distill.screen.lines import Narrator
from distill.screen.panel import render_panel
from distill.screen.results import print_agreement
from distill.screen.snapshot import RunFiles, RunSnapshot

REFRESH_S = 0.25  # of the live panel and of looking for events
LOG = "log.txt"  # in a run folder


def watch(
    run_folder: Path,
    *,
    live: bool,
    console: Console,
    stop: threading.Event,
    hint: str = "",
    since_unix: float = 0.0,
    logs: bool = False,
) -> Status | None:
    """The last status read, after showing the run until it ends or ``stop`` is set.

    ``live`` asks for the panel; without a terminal the plain lines are written all the same.
    ``hint`` is shown under the panel (what Ctrl-C does here). A launcher gives its start as
    ``since_unix``: the end of an earlier attempt in the same folder is then not taken for this one.
    It alone ``logs`` what it shows in ``log.txt``.
    """
    files = RunFiles(run_folder, since_unix=since_unix)
    log = Log(run_folder / LOG if logs else None)
    if live and console.is_terminal and not console.is_dumb_terminal:
        return _watch_live(files, console, stop, log, hint)
    return _watch_plain(files, console, stop, log)


def _watch_live(
    files: RunFiles, console: Console, stop: threading.Event, log: "Log", hint: str
) -> Status | None:
    snapshot, narrator = files.take_snapshot(), Narrator(files.since_unix)
    with Live(
        render_panel(snapshot, console.width, hint, console.height),
        console=console,
        auto_refresh=False,
        transient=False,
    ) as screen:
        while not _is_done(snapshot) and not stop.wait(REFRESH_S):
            snapshot = files.take_snapshot()
            log.write(narrator.lines(snapshot))
            screen.update(render_panel(snapshot, console.width, hint, console.height), refresh=True)
        snapshot = files.take_snapshot()
        screen.update(render_panel(snapshot, console.width, height=console.height), refresh=True)
        log.write(narrator.lines(snapshot))
    if snapshot.summary is not None:
        print_agreement(console, snapshot.summary)
        console.print(ending_box(files.run_folder, snapshot.summary))
        log.write(ending_of(files.run_folder, snapshot.summary).lines())
    return snapshot.status


def _watch_plain(
    files: RunFiles, console: Console, stop: threading.Event, log: "Log"
) -> Status | None:
    narrator = Narrator(files.since_unix)
    while True:
        is_last = stop.is_set()
        snapshot = files.take_snapshot()
        lines = narrator.lines(snapshot)
        is_done = is_last or _is_done(snapshot)
        if is_done and snapshot.summary is not None:
            lines[-1:-1] = ending_of(
                files.run_folder, snapshot.summary
            ).lines()  # the state is last
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        log.write(lines)
        if is_done:
            return snapshot.status
        stop.wait(REFRESH_S)


def _is_done(snapshot: RunSnapshot) -> bool:
    return snapshot.status is not None and snapshot.status.state in FINAL_STATES


class Log:
    """The lines of a run in a file, those of a resume after those of before. A full disk costs lines, not the run."""

    def __init__(self, path: Path | None) -> None:
        """Nothing is written where there is no path."""
        self._path = path

    def write(self, lines: Sequence[str]) -> None:
        """Appends lines, their control characters written out."""
        if self._path is None or not lines:
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{printable(line)}\n" for line in lines)
