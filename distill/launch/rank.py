"""The frame around one rank's work: signals in, heartbeat out, and how it ends when others are gone.

    signals and files -> StopSaveRequests      heartbeat, stacks -> files     an exception -> the first cause

Under ``distill`` the launcher watches the ranks and ends them. Under another launcher two ranks of each
node watch it, because either may be the one that hangs, and the first and the last node watch the others
(``node_watch``). Every rank ends by itself when its launcher is gone, or when the job has failed and
something keeps it from noticing.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from distill.engine.join import MeetingPlace
from distill.engine.node import require_node_size
from distill.errors import StorageError
from distill.job.prepare import read_job
from distill.job.run import work
from distill.launch.board import board_of, leave_board, sweep_boards
from distill.launch.disk import DiskWatch, send
from distill.launch.node_watch import NodeWatch
from distill.launch.process import end_with
from distill.launch.watchdog import StragglerReport, end_ranks
from distill.runfolder.events import Event, note
from distill.runfolder.failure import (
    LOST_EXIT_CODE,
    Failure,
    failure_of,
    failure_of_dead,
    find_dead,
    is_lost_connection,
    read_failure,
    write_failure,
)
from distill.runfolder.heartbeat import Heartbeat, read_records, stacks_on_signal, stacks_path
from distill.runfolder.lock import run_lock
from distill.runfolder.process_identity import ProcessIdentity, identity_of
from distill.runfolder.requests import StopSaveRequests
from distill.runfolder.status import StatusFile
from teacher.batch import use_device

LEAVE_S = 3.0  # for the process group to be destroyed after an error; NCCL waits for kernels that may never end
GRACE_S = 5.0  # from the first cause on, for a rank to end by itself


@dataclass(frozen=True)
class LauncherLink:
    """The launcher of this machine, and a pipe to it for the results of saves."""

    process: ProcessIdentity
    saves: Connection


def entry(run_folder: str, launcher: LauncherLink | None, store: MeetingPlace) -> bool:
    """Runs one rank of the prepared job; ``launcher`` is None under another launcher, ``store`` as in ``join_ranks``.

    Returns:
        False where the job was stopped before its end.
    """
    folder, rank = Path(run_folder), int(os.environ["RANK"])
    if launcher is not None:
        # not by the heartbeat, which begins later and ends with the job
        end_with([launcher.process, identity_of(os.getppid())], LOST_EXIT_CODE)
    requests = StopSaveRequests(folder)
    board = board_of(folder, store, has_launcher=launcher is not None)
    guard = RankMonitor(folder, board, rank, has_launcher=launcher is not None)
    heartbeat = Heartbeat(board, rank, on_beat=lambda: guard.look(requests))
    try:
        with requests.listening(), stacks_on_signal(folder, rank), run_lock(folder) as lock:
            if launcher is not None:
                lock.share()
            with guard, heartbeat:
                return _work(folder, requests, heartbeat, guard, launcher, store)
    except _StuckError as stuck:
        os._exit(stuck.exit_code)  # the usual end would wait for the process group too


class _StuckError(Exception):
    """The rank failed and cannot leave its process group; its cause is on disk."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _work(
    folder: Path,
    requests: StopSaveRequests,
    heartbeat: Heartbeat,
    guard: "RankMonitor",
    launcher: LauncherLink | None,
    store: MeetingPlace,
) -> bool:
    """Runs the job; after an error the cause is on disk before anything is destroyed, unless another rank has to show it."""
    try:
        job = read_job(folder)
        require_node_size(os.environ, job.request.ranks_per_node)
        heartbeat.set_limit(job.recipe.engine.hang_limit_s)
        guard.watch_others(job.recipe.engine.hang_limit_s)
        report = guard.take_save if launcher is None else partial(send, launcher.saves)
        return work(job, requests, heartbeat, store, report)
    except BaseException as error:
        is_lost = is_lost_connection(error)
        failure = None if is_lost else failure_of(error, heartbeat.record(), folder)
        if failure is not None:
            guard.fail(failure)
        has_left = _leave_group()
        if failure is None and launcher is None:
            failure = guard.cause()
        if failure is not None and launcher is None:  # one that there is does so itself
            StatusFile(folder).mark_failed(failure.message)
        if not has_left:
            code = LOST_EXIT_CODE if failure is None else failure.exit_code
            raise _StuckError(f"{type(error).__name__}: {error}", code) from error
        if failure is not None and (is_lost or isinstance(error, StorageError)):
            raise failure.to_error() from error
        raise


def _leave_group() -> bool:
    """Destroys the process group, if there is one; False where that does not end in time."""
    if not dist.is_initialized():
        return True
    device = torch.device("cpu")
    if torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    leaving = threading.Thread(target=_destroy_group, args=(device,), name="leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)
    return not leaving.is_alive()


def _destroy_group(device: torch.device) -> None:
    use_device(device)
    dist.destroy_process_group()


class RankMonitor:
    """Looks around at every beat of one rank. Inside a ``with``, around that of the heartbeat: at its end the node's file is complete."""

    def __init__(
        self, run_folder: Path, board: Path, world_rank: int, *, has_launcher: bool
    ) -> None:
        """``has_launcher``: it watches the ranks; else they do."""
        self._run_folder, self._board, self._has_launcher = run_folder, board, has_launcher
        self._num_ranks, self._world_rank = int(os.environ["WORLD_SIZE"]), world_rank
        self._node = NodeWatch(run_folder, board, world_rank, self._num_ranks)
        self._failed_at: float | None = None
        is_first = not has_launcher and world_rank == 0
        self._disk = DiskWatch(run_folder, _print_line) if is_first else None

    def __enter__(self) -> "RankMonitor":
        """Removes what killed launches left in the memory of this node."""
        if not self._has_launcher:
            sweep_boards(self._board)
        return self

    def __exit__(self, *exception: object) -> None:
        """Publishes how this rank ended; the last one of the node removes its board."""
        self._node.leave()
        if not self._has_launcher:
            leave_board(self._board)

    def watch_others(self, limit_s: float) -> None:
        """Begins to look for ranks that hold the job up, where no launcher does."""
        if not self._has_launcher:
            self._node.judge_others(limit_s)

    def look(self, requests: StopSaveRequests) -> None:
        """Reads requests, watches if that is this rank's part, and ends the process when there is nothing left to do."""
        if self._disk is not None:
            self._disk.look()
        if self._world_rank == 0:
            requests.look()
        stragglers = self._node.look()
        self._end_without_folder()
        if stragglers is not None:
            self._end(stragglers)
        self._end_with_the_others()

    def fail(self, failure: Failure) -> None:
        """Leaves the cause of the job's end, if it is the first, where all ranks find it."""
        write_failure(self._run_folder, failure)
        self._node.note_failure()

    def take_save(self, failure: str) -> None:
        """Takes the result of a save of rank 0, empty for a good one."""
        if self._disk is not None:
            self._disk.take(failure)

    def cause(self) -> Failure:
        """Why this rank lost its connection: the first cause, or who is dead; waits for it to show."""
        dead = find_dead(self._run_folder, self._num_ranks, self._world_rank)
        found = read_failure(self._run_folder)
        if found is None:
            found = failure_of_dead(dead, {}) if dead else _unknown_failure()
            self.fail(found)
        return found

    def _end(self, stragglers: StragglerReport) -> None:
        if read_failure(self._run_folder) is not None:
            return
        self.fail(stragglers.to_failure(self._run_folder))
        StatusFile(self._run_folder).mark_failed(stragglers.message)
        note(self._run_folder, Event("hung", stragglers.message))
        records = read_records(self._board, self._num_ranks)
        end_ranks([record for record in records if record.world_rank in stragglers.world_ranks])

    def _end_without_folder(self) -> None:
        gone = self._node.gone_text()
        if gone:  # no file can show it, and no other rank waits for this one for long
            _print_line(gone)
            os._exit(LOST_EXIT_CODE)

    def _end_with_the_others(self) -> None:
        if self._failed_at is None:
            self._failed_at = time.monotonic() if self._node.has_failed else None
            return
        if time.monotonic() - self._failed_at < GRACE_S:
            return
        with (
            suppress(OSError),
            stacks_path(self._run_folder, self._world_rank).open("a") as file,
        ):
            faulthandler.dump_traceback(file, all_threads=True)
        os._exit(LOST_EXIT_CODE)


def _print_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _unknown_failure() -> Failure:
    fix = "The network between hosts may have failed; the same command resumes."
    return Failure("died", "every rank lives, but they lost each other", fix, LOST_EXIT_CODE)
