"""Keeps the local ranks of a job going: starts them, watches them, reports why they ended, starts them again.

Each attempt is a start of new processes (``distill.engine.local_ranks``). Between two attempts the cause
is known, so what needs a person is not tried again, and a request to stop ends it.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from distill.engine.local_ranks import LocalRanks
from distill.launch.disk import DiskWatch, receive
from distill.launch.rank import GRACE_S, LauncherLink, entry
from distill.launch.watchdog import Watchdog, end_ranks
from distill.runfolder.events import Event, EventKind, note
from distill.runfolder.failure import (
    FILE,
    Failure,
    FailureKind,
    failure_of_dead,
    read_failure,
    write_failure,
)
from distill.runfolder.heartbeat import HeartbeatRecord, forget_records, read_records
from distill.runfolder.presence import FolderPresence
from distill.runfolder.process_identity import this_process
from distill.runfolder.requests import STOP, is_requested

LOOK_S = 0.25
KINDS: dict[FailureKind, EventKind] = {
    "user": "failed",
    "student": "failed",
    "error": "failed",
    "died": "died",
    "hung": "hung",
}


class StragglerReaper:
    """Ends the other ranks some seconds after one has died: those that are stuck would wait for it."""

    def __init__(self, board: Path, processes: Sequence[BaseProcess]) -> None:
        self._board, self._processes = board, processes
        self._dead_since: float | None = None

    def end_if_one_is_dead(self) -> None:
        """Call again and again."""
        gone = {each.pid for each in self._processes if each.exitcode is not None}
        if not gone:
            return
        records = read_records(self._board, len(self._processes))
        done = {record.pid for record in records if record.end == "done"}
        if self._dead_since is None and not done.issuperset(gone):
            self._dead_since = time.monotonic()
        if self._dead_since is not None and time.monotonic() - self._dead_since > GRACE_S:
            for process in self._processes:
                process.kill()


class Supervisor:
    """The ranks of one launch on this machine."""

    def __init__(
        self,
        run_folder: Path,
        num_ranks: int,
        *,
        max_restarts: int,
        hang_limit_s: float,
        start_method: str,
        say: Callable[[str], None],
    ) -> None:
        """``start_method``: of the ranks' processes, from ``choose_start_method``; ``say`` prints a line."""
        self._run_folder, self._num_ranks = run_folder, num_ranks
        self._max_restarts, self._hang_limit_s = max_restarts, hang_limit_s
        self._start_method = start_method
        self._exit_codes: dict[int, int] = {}
        self._start_error = ""
        self._board = Path()
        self._records: list[HeartbeatRecord] = []  # as they were when the attempt ended
        self._presence = FolderPresence(run_folder)
        self._disk = DiskWatch(run_folder, say)
        self._saves, self._send_saves = multiprocessing.Pipe(duplex=False)

    def run(self) -> Failure | None:
        """Returns when the job has ended: None for a good end, or why the last attempt failed.

        A start without a student that was parked is not counted, nor one with smaller micro-batches of a student:
        there are at most as many as students, and as often as their micro-batches can be halved.
        """
        num_restarts = 0
        while (failure := self._presence_after(self._attempt())) is not None:
            note(self._run_folder, Event(KINDS[failure.kind], failure.message))
            is_counted = failure.kind != "student"
            is_last = is_counted and num_restarts == self._max_restarts
            if failure.kind == "user" or is_last or is_requested(self._run_folder, STOP):
                break
            num_restarts += is_counted
            text = f"restart {num_restarts} of {self._max_restarts}" if is_counted else "restarted"
            note(self._run_folder, Event("restarted", f"{text}, from the last checkpoint"))
        return failure

    def _presence_after(self, failure: Failure | None) -> Failure | None:
        """What an attempt ended with, or that the run folder is gone: it waits for it to be there again, or for its limit."""
        return self._presence.wait() or failure

    def _attempt(self) -> Failure | None:
        (self._run_folder / FILE).unlink(missing_ok=True)
        forget_records(self._run_folder)
        self._exit_codes, self._start_error = {}, ""
        with LocalRanks(self._start_method, self._num_ranks, self._log_folder()) as ranks:
            self._board = ranks.folder
            try:
                link = LauncherLink(this_process(), self._send_saves)
                ranks.start(entry, str(self._run_folder), link)
            except OSError as error:
                self._start_error = f"the ranks could not be started: {error}"
            else:
                self._watch(ranks)
            self._records = self._read_board()
        return self.diagnose()

    def _read_board(self) -> list[HeartbeatRecord]:
        return read_records(self._board, self._num_ranks)

    def _log_folder(self) -> Path:
        """A new folder for the output of one attempt's ranks."""
        logs = self._run_folder / "logs"
        logs.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=logs))

    def _watch(self, ranks: LocalRanks) -> None:
        """Returns when every rank has ended."""
        watchdog: Watchdog | None = Watchdog(ranks.folder, self._num_ranks, self._hang_limit_s)
        reaper = StragglerReaper(ranks.folder, ranks.processes)
        while ranks.are_running:
            ranks.wait(LOOK_S)
            self._note_first_to_fail(ranks)
            reaper.end_if_one_is_dead()
            for failure in receive(self._saves):
                self._disk.take(failure)
            self._disk.look()
            if self._presence.look() is not None:
                return  # and they end
            stragglers = None if watchdog is None else watchdog.look()
            if stragglers is not None:
                write_failure(self._run_folder, stragglers.to_failure(self._run_folder))
                end_ranks(self._read_board())
                watchdog = None
        self._note_first_to_fail(ranks)

    def _note_first_to_fail(self, ranks: LocalRanks) -> None:
        """Notes how the first ranks failed, and asks the others to end, some of which cannot see it yet."""
        failed = {rank: code for rank, code in ranks.exit_codes.items() if code != 0}
        if self._exit_codes or not failed:
            return
        self._exit_codes = failed
        for process in ranks.processes:
            process.terminate()

    def diagnose(self) -> Failure | None:
        """Why the attempt failed: what a rank or the watchdog wrote, or else who died without a word."""
        if not self._exit_codes and not self._start_error:
            return None
        found = read_failure(self._run_folder)
        if found is None and self._start_error:
            fix = f"Look at the logs in {self._run_folder / 'logs'}; the same command resumes."
            found = Failure("error", self._start_error, fix, 1)
        if found is None:
            records = self._records
            killed = {rank for rank, code in self._exit_codes.items() if code < 0}
            dead = [record for record in records if not record.end]
            first = [record for record in dead if record.world_rank in killed]
            ended = [record for record in records if record.world_rank in self._exit_codes]
            is_unseen = bool(killed - {record.world_rank for record in records})
            found = failure_of_dead(first or ([] if is_unseen else dead or ended), self._exit_codes)
        write_failure(self._run_folder, found)
        return found
