"""A task of a scheduler: becomes a rank, or starts the ranks of its node and stays until all have ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from distill.errors import SetupError
from distill.launch.detect import LaunchedTask, line_of, ranks_of_task, task_of
from distill.runfolder.requests import Handler, handling

if TYPE_CHECKING:
    from distill.recipe.keys import EngineSpec

LOOK_S = 0.2
ENDS_S = 15.0  # for the other ranks to end by themselves once one has failed
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_as_task(
    command: str,
    wanted: int | None,
    read_engine: Callable[[], "EngineSpec"],
    stopped_code: int = 0,
) -> int | None:
    """Sets the variables of a rank if this process is a task that is one; prints which, in one line.

    ``read_engine`` reads the recipe's, and is called by the only task of a node alone; ``stopped_code`` is that of ``--stopped-code``.

    Returns:
        None where the process goes on, as a rank or alone; else the exit code of the ranks that the task started.

    Raises:
        RecipeError: the variables of the scheduler contradict each other or ``wanted``, the ranks that ``--gpus`` names.
        SetupError: no variable names the host of task 0, or that name has no address here.
    """
    task = task_of(os.environ, command)
    if task is None:
        return None
    available = _available(read_engine()) if wanted is None and task.num_local == 1 else 1
    num_ranks = ranks_of_task(task, wanted, available, command)
    if task.num_tasks * num_ranks == 1:
        return None
    _require_address(task, command)
    if task.index == 0:
        sys.stderr.write(line_of(task, num_ranks) + "\n")
    if num_ranks == 1:
        os.environ.update(task.to_variables(1))
        return None
    each = [task.to_variables(num_ranks, local_rank) for local_rank in range(num_ranks)]
    return run_ranks([sys.executable, "-m", "distill", *sys.argv[1:]], each, stopped_code)


def _require_address(task: LaunchedTask, command: str) -> None:
    if task.launcher == "PET":  # names of pods come up with them
        return
    try:
        socket.getaddrinfo(task.address, task.port)
    except OSError as error:
        raise SetupError(
            f"{socket.gethostname()}: {task.address}, the host of rank 0 by {task.launcher}, has no address here ({error})",
            fix=f"Set MASTER_ADDR to an address of it, for every task: MASTER_ADDR=10.0.0.1 srun ... {command}.",
        ) from error


def _available(engine: "EngineSpec") -> int:
    """Ranks of a node by itself: the recipe's, or one for each visible GPU."""
    from distill.launch.local import count_processes

    is_on_cpu = engine.processes == "auto" and engine.device == "cpu"
    return 1 if is_on_cpu else count_processes(engine.processes)


def run_ranks(
    command: Sequence[str], variables: Sequence[Mapping[str, str]], stopped_code: int = 0
) -> int:
    """Runs a command once for each set of variables; signals to stop and to save are passed on.

    Returns:
        0, ``stopped_code`` where a rank ended with it and none failed, or the exit code of the first one that failed, 128 + the number of its signal for a killed one. The others have
        ``ENDS_S`` then.
    """
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, _: object) -> None:
        for each in ranks:
            if each.poll() is None:
                each.send_signal(signum)

    def leave_to_ranks(_signum: int, _: object) -> None:
        """Ctrl-C of a terminal reaches every rank by itself."""

    handlers: dict[signal.Signals, Handler] = {
        **dict.fromkeys(PASSED_ON, pass_on),
        signal.SIGINT: leave_to_ranks,
    }
    with handling(handlers):
        try:
            for each in variables:
                ranks.append(subprocess.Popen(list(command), env={**os.environ, **each}))
            return _wait(ranks, stopped_code)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stopped_code: int) -> int:
    failed_at, code = 0.0, 0
    while True:
        codes = [rank.poll() for rank in ranks]
        bad = next((each for each in codes if each not in {None, 0, stopped_code}), None)
        if not code and bad is not None:
            failed_at, code = time.monotonic(), bad if bad > 0 else 128 - bad
        if None not in codes or (code and time.monotonic() - failed_at > ENDS_S):
            return code or max(each for each in codes if each is not None)
        time.sleep(LOOK_S)
