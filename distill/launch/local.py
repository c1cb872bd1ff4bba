"""Starts the ranks of a job and stays with them: local processes, or one rank of somebody else's launch.

The launching process owns the terminal. It shows the run folder's files, and turns signals into
requests of the job (``distill.runfolder.requests``); a second Ctrl-C ends every rank. Under torchrun (or any launcher that
sets RANK and WORLD_SIZE) each process is a rank; rank 0 prepares the run folder first, then shows
plain lines.
"""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from distill.engine.node import ranks_on_node
from distill.engine.variables import is_launched, launched_rank
from distill.errors import StorageError, UserError
from distill.launch.milestones import exporting
from distill.launch.trackers import feeding
from distill.runfolder.lock import run_lock
from distill.runfolder.parked import PARKED_EXIT_CODE
from distill.runfolder.requests import SAVE, STOP, forget, handling, is_requested, leave_request
from distill.screen.console import make_console

if TYPE_CHECKING:
    from distill.job.prepare import JobRequest
    from distill.recipe.keys import EngineSpec
    from distill.runfolder.failure import Failure

STOPPED_EXIT_CODE = 130  # the shell's convention for a program ended by Ctrl-C
SAVE_HINT = "Ctrl-C saves and stops"


@dataclass(frozen=True)
class Options:
    """Command-line choices that are about this launch, not about the result."""

    processes: int | None
    out: Path
    name: str | None
    fresh: bool
    plain: bool
    until: str | None = None  # the phase to end after; None for the full job
    max_restarts: int = 0  # of all local ranks, when one fails
    stopped_code: int = 0  # exit code where the job was stopped before its end


class Launcher(Protocol):
    """Starts the ranks of a job and stays until all have ended; ``engine.launcher`` names one.

    Each rank is a process that runs the command of this one (``sys.argv``) with RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as under torchrun.
    """

    def __call__(self, request: "JobRequest", options: Options, engine: "EngineSpec") -> int:
        """Runs the job.

        Returns:
            0 for a good end; anything else is the exit code of the command.
        """
        ...


def run(recipe: str, overrides: list[str], options: Options) -> int:
    """Prepares and runs a job; the exit code is how it ended: 0 finished or, if ``stopped_code`` is, stopped by SIGTERM, 5 finished with a parked student, 130 stopped by Ctrl-C.

    Raises:
        UserError: with the exit code of the failure: 1, or 4 where a rank died or hung.
    """
    from distill.job.prepare import JobRequest
    from distill.listing.document import builtin_recipes
    from distill.listing.extensions import ExtensionKind, find
    from distill.recipe.reader import load_job

    parsed, _ = load_job(recipe, overrides)
    run_folder = options.out / (options.name or parsed.name)
    recipe_name = (
        recipe if recipe in builtin_recipes() else str(Path(recipe).absolute())
    )  # for any folder
    request = JobRequest(
        recipe_name, tuple(overrides), str(run_folder), resume_command(), options.until
    )
    launcher: Launcher = find(
        ExtensionKind.LAUNCHER, launcher_name(parsed.engine), "engine.launcher"
    )
    return launcher(request, options, parsed.engine)


def launcher_name(engine: "EngineSpec") -> str:
    """The launcher of this process: with RANK or WORLD_SIZE it is a rank, whatever the recipe names."""
    if is_launched(os.environ):
        return "external"
    return "local" if engine.launcher == "auto" else engine.launcher


def resume_command() -> str:
    """The command line that was used, without --fresh: running it again goes on."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    return shlex.join(["distill", *words])


def count_processes(wanted: int | str) -> int:
    """Local processes: as requested, or one per GPU, or one on a machine without."""
    if wanted != "auto":
        return int(wanted)
    import torch

    return max(1, torch.cuda.device_count())


def run_locally(request: "JobRequest", options: Options, engine: "EngineSpec") -> int:
    """Starts all ranks on this machine, watches them and starts them again: the launcher ``local``."""
    from distill.engine.device import require_device
    from distill.engine.forkserver import choose_start_method
    from distill.engine.loopback import require_loopback
    from distill.job.prepare import prepare
    from distill.launch.supervisor import Supervisor

    console = make_console()
    live = console.is_terminal and not options.plain
    folder = Path(request.run_folder)
    num_ranks = count_processes(options.processes or engine.processes)
    request = replace(request, ranks_per_node=None if engine.ranks_per_node else num_ranks)
    require_loopback(os.environ)
    start_method = choose_start_method(engine.device)  # it imports while the job is prepared
    require_device(engine.device, num_ranks)
    with run_lock(folder) as lock:
        lock.alone()
        job = prepare(
            request,
            num_ranks=num_ranks,
            fresh=options.fresh,
            say=partial(console.print, soft_wrap=True),
        )
        forget(folder)
        lock.share()
        supervisor = Supervisor(
            folder,
            num_ranks,
            max_restarts=options.max_restarts,
            hang_limit_s=job.recipe.engine.hang_limit_s,
            start_method=start_method,
            say=partial(console.print, soft_wrap=True),
        )
        with (
            _Signals(folder) as signals,
            feeding(folder, job.recipe.log),
            _screen(folder, console, live=live, hint=SAVE_HINT),
        ):
            with exporting(folder, job.recipe):
                failure = supervisor.run()
            if signals.num_interrupts > 1:
                raise _ended_at_once(folder)
            stopped_code = STOPPED_EXIT_CODE if signals.num_interrupts else options.stopped_code
            return _finalize(folder, failure, stopped_code)


@contextmanager
def _screen(run_folder: Path, console: Console, *, live: bool, hint: str = "") -> Iterator[None]:
    """Shows the run's files while inside."""
    from distill.screen.watch import watch

    done = threading.Event()
    watching = {
        "live": live,
        "console": console,
        "stop": done,
        "since_unix": time.time(),
        "hint": hint,
        "logs": True,
    }
    screen = threading.Thread(target=watch, args=(run_folder,), kwargs=watching, daemon=True)
    screen.start()
    try:
        yield
    finally:
        done.set()
        screen.join(timeout=5)


def run_as_rank(request: "JobRequest", options: Options, engine: "EngineSpec") -> int:
    """Is one rank of an outer launch, of which rank 0 prepares and concludes: the launcher ``external``.

    Raises:
        RecipeError: the outer launch has not set which rank this is.
        SetupError: its ranks do not come together.
    """
    from distill.engine.device import require_device
    from distill.job.prepare import prepare
    from distill.launch.rank import entry
    from distill.launch.rendezvous import Rendezvous, open_store
    from distill.runfolder.heartbeat import forget_records

    here = launched_rank(os.environ, request.resume_command)
    ranks_per_node = None if engine.ranks_per_node else ranks_on_node(os.environ)
    folder = Path(request.run_folder)
    rendezvous = Rendezvous(here, open_store(here))
    request = replace(request, ranks_per_node=ranks_per_node, launch=rendezvous.nonce)
    if here.rank != 0:
        rendezvous.join(folder, request.overrides)
        is_done = entry(request.run_folder, None, rendezvous.store_of_ranks())
        return 0 if is_done else options.stopped_code
    console = make_console()
    with run_lock(folder) as lock:
        with rendezvous.failing_together():
            require_device(engine.device)
            lock.alone()
            job = prepare(
                request,
                num_ranks=here.num_ranks,
                fresh=options.fresh,
                say=partial(console.print, soft_wrap=True),
            )
            forget(folder)
            forget_records(folder)
            lock.share()
            rendezvous.admit(folder, request.overrides)
        with feeding(folder, job.recipe.log), _screen(folder, console, live=False):
            with exporting(folder, job.recipe):
                entry(request.run_folder, None, rendezvous.store_of_ranks())
            code = _finalize(folder, None, options.stopped_code)
        # torchrun would start all ranks again, only to end with the same students parked
        is_hidden = code == PARKED_EXIT_CODE and "TORCHELASTIC_RUN_ID" in os.environ
        return 0 if is_hidden else code


def _finalize(run_folder: Path, failure: "Failure | None", stopped_code: int) -> int:
    """Scores and pictures of a finished run, or the reason why it is not finished; the exit code."""
    from distill.report.summary import finish
    from distill.runfolder.status import StatusFile
    from distill.screen.tables import unfinished_students

    status_file = StatusFile(run_folder)
    status = status_file.read()
    was_ended = failure is not None and failure.kind == "died" and is_requested(run_folder, STOP)
    if failure is not None and not was_ended:
        status_file.mark_failed(failure.message)
        raise failure.to_error()
    if status is None or status.state != "exporting":
        return stopped_code
    missing = f"scores are missing: distill eval {run_folder}"
    with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), _end_scoring)):
        try:
            summary = finish(run_folder)
        except StorageError:
            status_file.write(status.ended("stopped", missing))
            raise
        except KeyboardInterrupt:
            status_file.write(status.ended("stopped", missing))
            raise UserError(
                f"{run_folder}: ended while it was scored; every student is trained and exported",
                fix=f"`distill eval {run_folder}` scores them.",
                exit_code=STOPPED_EXIT_CODE,
            ) from None
    return PARKED_EXIT_CODE if unfinished_students(summary) else 0


def _end_scoring(*_: object) -> None:
    raise KeyboardInterrupt


def _ended_at_once(run_folder: Path) -> UserError:
    return UserError(
        f"{run_folder}: ended at once, nothing was saved",
        fix="The same command resumes from the last checkpoint.",
        exit_code=STOPPED_EXIT_CODE,
    )


class _Signals:
    """Signals to the launcher become requests of the job; a second Ctrl-C ends every rank at once."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self.num_interrupts = 0

    def __enter__(self) -> "_Signals":
        self._handling = handling(
            {
                signal.SIGINT: self._on_interrupt,
                signal.SIGTERM: self._on_stop,
                signal.SIGHUP: self._on_hangup,
                signal.SIGUSR1: self._on_save,
            }
        )
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handling.__exit__(None, None, None)

    def _on_stop(self, *_: object) -> None:
        self._leave(STOP)

    def _leave(self, request: str) -> None:
        """Leaves a request for the ranks; where no file can be, a request to stop goes to them as a signal."""
        try:
            leave_request(self._run_folder, request)
        except OSError:
            for child in multiprocessing.active_children() if request == STOP else ():
                child.terminate()

    def _on_hangup(self, *_: object) -> None:
        """The terminal is gone: what is written to it from now on would be errors."""
        self._leave(STOP)
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                os.dup2(nothing, descriptor)
        os.close(nothing)

    def _on_save(self, *_: object) -> None:
        self._leave(SAVE)

    def _on_interrupt(self, *_: object) -> None:
        self.num_interrupts += 1
        self._leave(STOP)
        if self.num_interrupts == 1:
            sys.stderr.write("\nstopping: every rank saves first; Ctrl-C again ends at once\n")
            return
        for child in multiprocessing.active_children():
            child.kill()
