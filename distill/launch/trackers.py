"""Starts a process for each tracker that a recipe names, beside the ranks, and ends it with the launcher.

The process reads the run folder only (``distill.screen.follower``). One that hangs or fails is noted in
``events.jsonl``; the job neither waits for it while it trains nor ends for it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.runfolder.events import Event, note
from distill.runfolder.files import make_folder

WAIT_S = (
    20.0  # for what is left to be handed over at the end; less than a person waits for a prompt
)
HURRY_S = 2.0  # the same after an error or a second Ctrl-C
STUCK_S = 60.0  # after which a process whose launcher is gone ends itself
CODE = "import sys; from distill.launch.trackers import feed; feed(*sys.argv[1:])"


@contextmanager
def feeding(run_folder: Path, trackers: Sequence[str]) -> Iterator[None]:
    """Feeds trackers while inside; ``jsonl`` is none, the ranks write it themselves."""
    names = [name for name in dict.fromkeys(trackers) if name != "jsonl"]
    processes = {name: start_beside(CODE, run_folder, name) for name in names}
    wait_s = HURRY_S
    try:
        yield
        wait_s = WAIT_S
    finally:
        _end(run_folder, processes, wait_s)


def start_beside(code: str, run_folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Starts Python with code that gets the run folder and a name; its output is ``trackers/NAME.txt``.

    The process is in a new session, since Ctrl-C in the terminal is for the ranks, and ends with its standard input.
    """
    folder = run_folder / "trackers"
    make_folder(folder)
    with (folder / f"{name}.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(run_folder), name],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def close_input(process: subprocess.Popen[bytes]) -> None:
    """Lets a process that ``start_beside`` started know that it is to end."""
    assert process.stdin is not None, "the process was started with a pipe"
    with suppress(OSError):
        process.stdin.close()


def wait_or_kill(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    """Waits until a process has ended, and kills it after ``wait_s``; whether it ended by itself."""
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def _end(run_folder: Path, processes: dict[str, subprocess.Popen[bytes]], wait_s: float) -> None:
    for process in processes.values():
        close_input(process)
    deadline = time.monotonic() + wait_s
    for name, process in processes.items():
        if not wait_or_kill(process, max(0.0, deadline - time.monotonic())):
            _note(run_folder, name, f"did not take all rows within {wait_s:.0f} s")


def feed(run_folder: str, tracker: str) -> None:
    """Is the process of one tracker: feeds it until standard input is closed, by the launcher or by its end."""
    from distill.screen.follower import follow

    os.nice(10)
    stop = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()
    try:
        follow(Path(run_folder), tracker, stop)
    except BaseException as error:  # whatever a tracker raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _note(Path(run_folder), tracker, f"gets no more rows: {lines[0]}")
        raise


def _wait_for_end(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()
    time.sleep(STUCK_S)
    os._exit(1)


def _note(run_folder: Path, tracker: str, text: str) -> None:
    again = f"`distill log {run_folder} --to {tracker}` hands over the rest"
    note(run_folder, Event("failed", f"{tracker} {text}; {again}"))
