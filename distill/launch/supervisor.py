"""Keeps the local ranks of a job going: starts them, watches them, reports why they ended, starts them again.

Each attempt is one torch elastic launch on a separate thread, so that the main thread keeps the
terminal and its signals. Restarting is done here and not by elastic: between two attempts the cause
is known, so what needs a person is not tried again, and a request to stop ends it.
"""

import logging
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distill.launch.process import this_process
from distill.launch.rank import GRACE_S, entry
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
from distill.runfolder.heartbeat import read_records, record_path, state_of
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
    """Ends the other ranks some seconds after one has died: elastic waits half a minute for those that are stuck."""

    def __init__(self, run_folder: Path, num_ranks: int) -> None:
        self._run_folder, self._num_ranks = run_folder, num_ranks
        self._pids: list[int] = []
        self._dead_since: float | None = None

    def end_if_one_is_dead(self) -> None:
        """Call again and again. Reads /proc: asking the process objects would take exit codes from elastic."""
        if len(self._pids) < self._num_ranks:
            self._pids = [child.pid for child in active_children() if child.pid is not None]
            return
        gone = [pid for pid in self._pids if state_of(pid) in {"", "Z"}]
        if not gone:
            return
        done = {s.pid for s in read_records(self._run_folder, self._num_ranks) if s.end == "done"}
        if self._dead_since is None and not done.issuperset(gone):
            self._dead_since = time.monotonic()
        if self._dead_since is not None and time.monotonic() - self._dead_since > GRACE_S:
            for pid in set(self._pids) - set(gone):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


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
    ) -> None:
        """``start_method``: of the ranks' processes, from ``choose_start_method``."""
        self._run_folder, self._num_ranks = run_folder, num_ranks
        self._max_restarts, self._hang_limit_s = max_restarts, hang_limit_s
        self._start_method = start_method
        self._exit_codes: dict[int, int] = {}
        self._has_failed, self._start_error = False, ""

    def run(self) -> Failure | None:
        """Returns when the job has ended: None for a good end, or why the last attempt failed.

        A start without a student that was parked is not counted: there are at most as many as students.
        """
        num_restarts = 0
        while (failure := self._attempt()) is not None:
            note(self._run_folder, Event(KINDS[failure.kind], failure.message))
            is_counted = failure.kind != "student"
            is_last = is_counted and num_restarts == self._max_restarts
            if failure.kind == "user" or is_last or is_requested(self._run_folder, STOP):
                break
            num_restarts += is_counted
            text = f"restart {num_restarts} of {self._max_restarts}" if is_counted else "restarted"
            note(self._run_folder, Event("restarted", f"{text}, from the last checkpoint"))
        return failure

    def _attempt(self) -> Failure | None:
        (self._run_folder / FILE).unlink(missing_ok=True)
        shutil.rmtree(record_path(self._run_folder, 0).parent, ignore_errors=True)
        self._exit_codes, self._has_failed, self._start_error = {}, False, ""
        watchdog: Watchdog | None = Watchdog(self._run_folder, self._num_ranks, self._hang_limit_s)
        rest = StragglerReaper(self._run_folder, self._num_ranks)
        ranks = threading.Thread(target=self._run_ranks, daemon=True)
        ranks.start()
        while ranks.is_alive():
            ranks.join(timeout=LOOK_S)
            rest.end_if_one_is_dead()
            stragglers = None if watchdog is None else watchdog.look()
            if stragglers is not None:
                write_failure(self._run_folder, stragglers.to_failure(self._run_folder))
                end_ranks(read_records(self._run_folder, self._num_ranks))
                watchdog = None
        return self.diagnose()

    def diagnose(self) -> Failure | None:
        """Why the attempt failed: what a rank or the watchdog wrote, or else who died without a word."""
        if not self._has_failed:
            return None
        found = read_failure(self._run_folder)
        if found is None and self._start_error:
            fix = f"Look at the logs in {self._run_folder / 'logs'}; the same command resumes."
            found = Failure("error", self._start_error, fix, 1)
        if found is None:
            records = read_records(self._run_folder, self._num_ranks)
            killed = {rank for rank, code in self._exit_codes.items() if code < 0}
            dead = [record for record in records if not record.end]
            first = [record for record in dead if record.world_rank in killed]
            ended = [record for record in records if record.world_rank in self._exit_codes]
            is_unseen = bool(killed - {record.world_rank for record in records})
            found = failure_of_dead(first or ([] if is_unseen else dead or ended), self._exit_codes)
        write_failure(self._run_folder, found)
        return found

    def _run_ranks(self) -> None:
        for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the cause is printed in one line
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
            start_method=self._start_method,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        )
        try:
            elastic_launch(config, entry)(str(self._run_folder), this_process())
        except ChildFailedError as error:
            self._has_failed = True
            self._exit_codes = {rank: each.exitcode for rank, each in error.failures.items()}
        except Exception as error:
            self._has_failed = True
            self._start_error = f"the ranks could not be started: {error}"
