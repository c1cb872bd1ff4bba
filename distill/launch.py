"""Starts the ranks of a job and stays with them: local processes by torch elastic, or one rank of somebody else's launch.

The launching process owns the terminal. It shows the run folder's files, and turns the first Ctrl-C
into "save and stop" for every rank and the second into an end. Under torchrun (or any launcher that
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from distill.errors import SetupError, UserError

if TYPE_CHECKING:
    from distill.prepare import JobRequest

STOPPED_EXIT_CODE = 130  # the shell's convention for a program ended by Ctrl-C
SAVE_HINT = "Ctrl-C saves and stops"
PREPARED_WAIT_S = 1800.0  # indexing a large folder may take minutes


@dataclass(frozen=True)
class Options:
    """Command-line choices that are about this launch, not about the result."""

    processes: int | None
    out: Path
    name: str | None
    fresh: bool
    plain: bool
    until: str | None = None  # the phase to end after; None for the whole job


def run(recipe: str, overrides: list[str], options: Options) -> int:
    """Prepares and runs a job; the exit code says how it ended: 0 finished, 1 failed, 130 stopped and saved."""
    from distill.prepare import JobRequest
    from distill.recipe_file import builtin_recipes, load_job

    parsed, _ = load_job(recipe, overrides)
    run_folder = options.out / (options.name or parsed.name)
    kept = recipe if recipe in builtin_recipes() else str(Path(recipe).absolute())  # for any folder
    request = JobRequest(kept, tuple(overrides), str(run_folder), resume_command(), options.until)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_rank(request, options)
    wanted = options.processes or parsed.engine.processes
    return _run_locally(request, options, count_processes(wanted))


def resume_command() -> str:
    """The command line that was used, without --fresh: running it again goes on."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    return shlex.join(["distill", *words])


def count_processes(wanted: int | str) -> int:
    """Local processes: as asked, or one per GPU, or one on a machine without."""
    if wanted != "auto":
        return int(wanted)
    import torch

    return max(1, torch.cuda.device_count())


def _run_locally(request: "JobRequest", options: Options, num_ranks: int) -> int:
    from distill.console import watch
    from distill.prepare import prepare

    console = Console()
    live = console.is_terminal and not options.plain
    job = prepare(request, num_ranks=num_ranks, fresh=options.fresh, say=console.print)
    done = threading.Event()
    watching = {
        "live": live,
        "console": console,
        "stop": done,
        "since_unix": time.time(),
        "hint": SAVE_HINT,
    }
    screen = threading.Thread(target=watch, args=(job.run_folder,), kwargs=watching, daemon=True)
    agent = _Agent(job.run_folder, num_ranks)
    with _CtrlC() as interrupts:
        agent.start()
        screen.start()
        try:
            agent.wait()
            code = _conclude(job.run_folder, agent.failure, interrupts.count > 0)
        finally:
            done.set()
            screen.join(timeout=5)
    return code


def _run_as_rank(request: "JobRequest", options: Options) -> int:
    """One rank of an outer launch; rank 0 prepares and concludes."""
    from distill.console import watch
    from distill.prepare import prepare
    from distill.worker import entry

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ready = (
        Path(request.run_folder)
        / f".ready-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}-{os.environ['MASTER_PORT']}"
    )
    if rank != 0:
        _wait_for(ready)
        entry(request.run_folder)
        return 0
    console = Console()
    job = prepare(request, num_ranks=num_ranks, fresh=options.fresh, say=console.print)
    done = threading.Event()
    watching = {"live": False, "console": console, "stop": done, "since_unix": time.time()}
    screen = threading.Thread(target=watch, args=(job.run_folder,), kwargs=watching, daemon=True)
    ready.touch()
    try:
        screen.start()
        entry(request.run_folder)
        return _conclude(job.run_folder, None, was_interrupted=False)
    finally:
        ready.unlink(missing_ok=True)
        done.set()
        screen.join(timeout=5)


def _wait_for(ready: Path) -> None:
    """Waits until rank 0 has prepared the run folder; it ends the launch if it cannot."""
    deadline = time.monotonic() + PREPARED_WAIT_S
    while not ready.exists():
        if time.monotonic() > deadline:
            raise SetupError(
                f"rank 0 did not prepare {ready.parent} within {PREPARED_WAIT_S:.0f} s",
                fix="Put --out on storage that all nodes share, and look at rank 0's output.",
            )
        time.sleep(0.1)


def _conclude(run_folder: Path, failure: str | None, was_interrupted: bool) -> int:
    """Scores and pictures of a finished run, or the reason why it is not finished."""
    from distill.finish import finish
    from distill.metrics import StatusFile
    from distill.worker import read_failure

    if failure is not None:
        told = read_failure(run_folder)
        raise told or UserError(
            failure, fix=f"Look at the logs in {run_folder / 'logs'}; the same command resumes."
        )
    status = StatusFile(run_folder).read()
    if status is not None and status.state == "stopped":
        return STOPPED_EXIT_CODE if was_interrupted else 0
    finish(run_folder)
    return 0


class _Agent:
    """Torch elastic on a thread of its own, so that the main thread keeps the terminal and its signals."""

    def __init__(self, run_folder: Path, num_ranks: int) -> None:
        self._run_folder, self._num_ranks = run_folder, num_ranks
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Starts the ranks."""
        self._thread.start()

    def wait(self) -> None:
        """Returns when every rank has ended."""
        while self._thread.is_alive():
            self._thread.join(timeout=0.2)

    def _run(self) -> None:
        import logging

        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from distill.worker import entry

        logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
        logs = self._run_folder / "logs"
        logs.mkdir(exist_ok=True)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._num_ranks,
            run_id=self._run_folder.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        )
        try:
            elastic_launch(config, entry)(str(self._run_folder))
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            self.failure = f"rank {rank} ended with exit code {first.exitcode}"
        except Exception as error:
            self.failure = f"the ranks could not be started: {error}"


class _CtrlC:
    """First Ctrl-C or SIGTERM: every rank saves and stops. Second: every rank is ended at once."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_CtrlC":
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM if self.count == 1 else signal.SIGKILL)
        if self.count == 1:
            sys.stderr.write("\nstopping: every rank saves first; Ctrl-C again ends at once\n")
