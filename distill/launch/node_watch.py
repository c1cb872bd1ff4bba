"""A rank's part in watching: ranks look at their node, and few of them at the job.

    every rank                       its record -> the board, twice a second; has the job failed? (the board)
    the lowest rank that lives       the board -> one file of the run folder; is the folder still there? a cause of failure?
    it and the highest               judge the board: who is silent or stuck
    it, on the first and last node   the files of all nodes: which node is silent, does everybody wait

The run folder may lie on storage that thousands of ranks share. What they do there together stays below
100 operations a second: a node publishes, looks for a failure and reads other nodes the more seldom the
more nodes there are, and up to every few seconds where one of its ranks stands for nearly as long as it may.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path

from distill.launch.board import FAILED, GONE
from distill.launch.watchdog import StragglerReport, Watchdog, is_late
from distill.runfolder.failure import FILE
from distill.runfolder.heartbeat import (
    BEAT_S,
    HeartbeatRecord,
    publish_every_s,
    publish_records,
    read_records,
    record_files,
    record_path,
)
from distill.runfolder.presence import FolderPresence

TAKE_OVER_S = 3.0  # silence of lower ranks after which the next one does their part
LOOKED_PER_S = 20.0  # for a cause of failure, by all nodes together
FOLDERS_PER_S = 10.0  # looks whether the run folder is there, by all nodes together
READ_PER_S = 3.0  # files of nodes, by each of the two that read them
SPREAD = 0.618  # of an interval, between ranks that follow each other
URGENT_S = 2.0  # between two of each where a rank stands for long, if seldom otherwise


class NodeWatch:
    """One rank's part; ``look`` is called at every beat."""

    def __init__(
        self,
        run_folder: Path,
        board: Path,
        world_rank: int,
        num_ranks: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_folder, self._board = run_folder, board
        self._world_rank, self._num_ranks, self._clock = world_rank, num_ranks, clock
        self._presence, self._gone = FolderPresence(run_folder, clock=clock), ""
        self._near: Watchdog | None = None
        self._far: Watchdog | None = None
        self._done_at: dict[str, float] = {}
        self._is_urgent = False

    @property
    def has_failed(self) -> bool:
        """Whether a rank of this node has found that the job failed."""
        return (self._board / FAILED).exists()

    def gone_text(self) -> str:
        """The line for people where the run folder is gone for too long; empty while it is not."""
        with suppress(OSError):
            self._gone = self._gone or (self._board / GONE).read_text(encoding="utf-8")
        return self._gone

    def note_failure(self) -> None:
        """Lets the ranks of this node know that the job failed."""
        with suppress(OSError):
            (self._board / FAILED).touch()

    def judge_others(self, limit_s: float) -> None:
        """Begins to judge: there is no launcher that does."""
        self._near = Watchdog(self._board, self._num_ranks, limit_s, clock=self._clock)
        self._far = Watchdog(self._run_folder, self._num_ranks, limit_s, clock=self._clock)

    def look(self) -> StragglerReport | None:
        """Does this rank's part; returns who holds the job up, if somebody does."""
        is_on_duty, is_highest = self._parts()
        for watchdog in (self._near, self._far):
            if watchdog is not None:
                watchdog.has_paused()
        if not is_on_duty and (not is_highest or self._near is None):
            return None
        records = read_records(self._board, self._num_ranks)
        if not records:
            return None
        self._is_urgent = any(is_late(record) for record in records if not record.end)
        num_nodes = ceil(self._num_ranks / len(records))
        if is_on_duty:
            self._publish(records, num_nodes)
            if self._is_due("failure", num_nodes / LOOKED_PER_S):
                is_there = (self._run_folder / FILE).exists()
                if is_there:
                    self.note_failure()
            if self._is_due("folder", num_nodes / FOLDERS_PER_S):
                self._look_for_folder()
        return self._find_stragglers(records, num_nodes, is_on_duty=is_on_duty)

    def leave(self) -> None:
        """Publishes how the ranks of this node ended so far; the record of this rank is complete."""
        records = read_records(self._board, self._num_ranks)
        if records:
            with suppress(OSError):
                publish_records(self._run_folder, records)

    def _parts(self) -> tuple[bool, bool]:
        """Whether this is the lowest rank that lives, and whether it is the highest, of those on the board."""
        mine, now_unix = str(record_path(self._board, self._world_rank)), time.time()
        is_on_duty, is_highest = True, True
        for path in record_files(self._board):
            is_highest = is_highest and path <= mine
            if path < mine and is_on_duty:
                with suppress(OSError):
                    is_on_duty = now_unix - os.stat(path).st_mtime > TAKE_OVER_S  # noqa: PTH116
        return is_on_duty, is_highest

    def _look_for_folder(self) -> None:
        failure = self._presence.look()
        if failure is not None:
            self._gone = failure.message
            with suppress(OSError):
                (self._board / GONE).write_text(failure.message, encoding="utf-8")

    def _publish(self, records: Sequence[HeartbeatRecord], num_nodes: int) -> None:
        if self._is_due("publish", publish_every_s(num_nodes)):
            with suppress(OSError):  # a full disk; the next one may fit
                publish_records(self._run_folder, records)

    def _find_stragglers(
        self, records: Sequence[HeartbeatRecord], num_nodes: int, *, is_on_duty: bool
    ) -> StragglerReport | None:
        if self._near is None or self._far is None:
            return None
        if len(records) == self._num_ranks:
            return self._near.judge(records)
        found = self._near.judge_node(records)
        is_end = records[0].world_rank == 0 or records[-1].world_rank == self._num_ranks - 1
        if found is not None or not (is_on_duty and is_end):
            return found
        if not self._is_due("read", num_nodes / READ_PER_S):
            return None
        others = read_records(self._run_folder, self._num_ranks)
        here = {record.world_rank for record in records}
        everybody = [*records, *(each for each in others if each.world_rank not in here)]
        return self._far.judge(everybody, self._late_s(num_nodes))

    def _late_s(self, num_nodes: int) -> float:
        """How late other nodes' records may be: twice the time between two, where that is more than a beat."""
        every_s = publish_every_s(num_nodes)
        return 2 * every_s if every_s > BEAT_S else 0.0

    def _is_due(self, what: str, every_s: float) -> bool:
        """Whether something is to be done again; it then counts as done."""
        now = self._clock()
        if self._is_urgent:
            every_s = min(every_s, URGENT_S)
        if what not in self._done_at:  # at once; from then on not all nodes at the same moment
            self._done_at[what] = now - every_s * (self._world_rank * SPREAD % 1)
            return True
        if now - self._done_at[what] < max(every_s, 0.8 * BEAT_S):
            return False
        self._done_at[what] = now
        return True
