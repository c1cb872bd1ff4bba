"""A command that trains nothing on several ranks: processes of this machine, or those of another launcher.

--ranks N       this process starts N of them and takes the result of rank 0
torchrun, srun  this process is a rank; rank 0 goes on with the result
"""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, not listed

from distill.engine.device import cores_of_rank, take_device
from distill.engine.forkserver import choose_start_method
from distill.engine.join import MeetingPlace, join_ranks
from distill.engine.local_ranks import LocalRanks
from distill.engine.variables import is_launched, launched_rank
from distill.errors import SetupError, UserError
from distill.launch.detect import task_of
from distill.launch.rendezvous import open_store
from distill.protocols.sharing import ALONE, Sharing

TIMEOUT = timedelta(days=1)  # the first rank fits probes between two batches of features
RESTART = "TORCHELASTIC_RESTART_COUNT"  # a store that outlives a start keeps its keys
Task = Callable[[torch.device, Sharing], Any]  # can be pickled; its result is that of rank 0


def become_rank(command: str) -> None:
    """Sets the variables of a rank where this process is a task of a scheduler; ``command`` is the line to type again.

    Raises:
        RecipeError: the variables of the scheduler contradict each other.
        SetupError: no variable names the host of task 0.
    """
    task = task_of(os.environ, command)
    if task is not None:
        os.environ.update(task.to_variables(1))


def run_on_ranks(task: Task, num_ranks: int, command: str) -> Any:
    """Returns what ``task`` returned on rank 0; on the other ranks of another launcher what it returned there.

    Raises:
        UserError: as the task does, or as a launch does.
    """
    if is_launched(os.environ):
        return _run_as_rank(task, command)
    return _run_locally(task, num_ranks) if num_ranks > 1 else task(take_device("auto"), ALONE)


def _run_locally(task: Task, num_ranks: int) -> Any:
    """Returns what ``task`` returned on rank 0 of ``num_ranks`` processes of this machine.

    Raises:
        UserError: it raised one on a rank, or a rank ended; then none is left.
    """
    with LocalRanks(choose_start_method("auto"), num_ranks) as ranks:
        ranks.start(_run_local_rank, task)
        are_done = False
        while not are_done:
            are_done = not ranks.are_running
            ranks.wait(0.0 if are_done else 1.0)
            for result in ranks.results.values():
                if isinstance(result, UserError):
                    raise result
            failed = {rank: code for rank, code in ranks.exit_codes.items() if code != 0}
            for rank, code in failed.items():
                fix = "The lines above have the cause."
                raise UserError(f"rank {rank} ended with exit code {code}", fix=fix)
        return ranks.results[0]


def _run_as_rank(task: Task, command: str) -> Any:
    """Returns what ``task`` returned on this rank of another launcher.

    Raises:
        RecipeError: the variables of the launch are wrong.
        SetupError: its ranks do not come together.
    """
    here = launched_rank(os.environ, command)
    store = PrefixStore(f"task {os.environ.get(RESTART, '0')}", open_store(here))
    return _run_rank(task, store)


def _run_local_rank(task: Task, store: str) -> Any:
    try:
        with redirect_stdout(sys.stderr):
            return _run_rank(task, store)
    except UserError as error:
        return error


def _run_rank(task: Task, store: MeetingPlace) -> Any:
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = take_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(cores_of_rank())
    try:
        join_ranks("cpu", TIMEOUT, store)
    except dist.DistError as error:
        raise SetupError(
            f"rank {rank} of {num_ranks} cannot join the others ({str(error).splitlines()[0]})",
            fix="Start the ranks again, all of them.",
        ) from error
    try:
        return task(device, Sharing(rank, num_ranks))
    finally:
        dist.destroy_process_group()
