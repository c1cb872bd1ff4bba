"""Who holds a job up: reads every rank's records and names the ones that others wait for.

A collective of gloo or NCCL that hangs ends after minutes, and the rank that gives up first is the
one that waited, not the one that was waited for. Here the records decide, in this order:

    silent    its file no longer changes: stopped, frozen, or its host is gone
    stuck     it runs and does not move, and waits neither in a collective nor for a device
    deadlock  every rank waits; those that are furthest behind are named

How long each may take comes with the record: the limit, more where the activity took long before (its
first times count too), much more the first times. On the watcher's host the kernel distinguishes a stopped process from a busy
one, and then the limit counts, whatever it was doing.

A node's ranks can be judged without the others (``judge_node``): who is silent or stuck is found there.
Records of other nodes arrive late, by the seconds between two that a node publishes.

The watcher may be stopped itself (Ctrl-Z, docker pause, a suspended SLURM job). It measures the time
between its looks, and after a pause every rank starts anew.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill.runfolder.failure import LOST_EXIT_CODE, Failure
from distill.runfolder.heartbeat import (
    FIRST_ALLOWED_S,
    PAUSE_S,
    HeartbeatRecord,
    read_records,
)

MARGIN = 0.8  # of the limit: looking, naming and ending take the rest
STOPPED = "T"
DUMP_S = 1.0  # for the ranks to write their stacks
NAMED = 16  # ranks without a record, in the line


@dataclass(frozen=True)
class StragglerReport:
    """Ranks that hold the job up, and the message for it."""

    world_ranks: tuple[int, ...]
    message: str

    def to_failure(self, run_folder: Path) -> Failure:
        """As the cause of the job's end."""
        fix = f"The stacks of all ranks are in {run_folder / 'stacks'}; the same command resumes."
        return Failure("hung", self.message, fix, LOST_EXIT_CODE)


class Watchdog:
    """Compares the records of the ranks with those of before. Needs no clock of another host."""

    def __init__(
        self,
        folder: Path,
        num_ranks: int,
        limit_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        state_of: Callable[[HeartbeatRecord], str] = lambda record: record.process.state(),
    ) -> None:
        """``folder``: a board or run folder for ``look``; ``limit_s``: a rank that does not move this long is named before it is over."""
        self._folder, self._num_ranks, self._limit_s = folder, num_ranks, limit_s
        self._clock, self._state_of = clock, state_of
        self._started = self._looked = clock()
        self._last: dict[int, tuple[tuple[int, int], float]] = {}
        self._known: dict[int, HeartbeatRecord] = {}

    def look(self) -> StragglerReport | None:
        """Reads all records; who holds the job up, if somebody does."""
        return self.judge(read_records(self._folder, self._num_ranks))

    def has_paused(self) -> bool:
        """Returns whether the watcher was stopped since the last call, and the ranks with it: then all start anew.

        To be called every few seconds where records are read more seldom.
        """
        now = self._clock()
        gap_s, self._looked = now - self._looked, now
        if gap_s <= PAUSE_S:
            return False
        self._started += gap_s
        self._last = {}
        return True

    def judge(
        self, records: Sequence[HeartbeatRecord], late_s: float = 0.0
    ) -> StragglerReport | None:
        """Compares records with those of before; who holds the job up, if somebody does. ``late_s``: how late they arrive."""
        if self.has_paused():
            return None
        running, quiet_s = self._running(records)
        missing = sorted(set(range(self._num_ranks)) - self._known.keys())
        waited_s = self._clock() - self._started
        if missing and waited_s > FIRST_ALLOWED_S + late_s:
            names = ", ".join(map(str, missing[:NAMED]))
            names += f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            return StragglerReport(
                tuple(missing), f"no record of rank {names} after {waited_s:.0f} s"
            )
        found = self._silent(running, quiet_s, late_s) or self._stuck(running)
        return found or (None if missing else self._deadlock(running))

    def judge_node(self, records: Sequence[HeartbeatRecord]) -> StragglerReport | None:
        """As ``judge``, by the records of one node alone: who is silent or stuck there."""
        if self.has_paused():
            return None
        running, quiet_s = self._running(records)
        return self._silent(running, quiet_s, 0.0) or self._stuck(running)

    def _running(
        self, records: Sequence[HeartbeatRecord]
    ) -> tuple[list[HeartbeatRecord], dict[int, float]]:
        """The last known record of every rank that has not ended, and for how long it has been the same."""
        now = self._clock()
        self._known.update({record.world_rank: record for record in records})
        running = [record for _, record in sorted(self._known.items()) if not record.end]
        return running, {record.world_rank: self._quiet_s(record, now) for record in running}

    def _quiet_s(self, record: HeartbeatRecord, now: float) -> float:
        """Since the rank's file last changed, by this host's clock."""
        mark = (record.pid, record.beat)
        before, since = self._last.get(record.world_rank, (None, now))
        if before != mark:
            self._last[record.world_rank] = (mark, now)
            return 0.0
        return now - since

    def _silent(
        self, running: Sequence[HeartbeatRecord], quiet_s: dict[int, float], late_s: float
    ) -> StragglerReport | None:
        silent = []
        for record in running:
            quiet = quiet_s[record.world_rank]
            if quiet < MARGIN * self._limit_s + late_s:
                continue
            is_stopped = self._state_of(record) == STOPPED
            if is_stopped or quiet > MARGIN * record.allowed_s + late_s:
                why = "its process is stopped" if is_stopped else "no record of life"
                silent.append((record, f"{record.describe()}; {why} for {quiet:.0f} s"))
        return _report_on(silent)

    def _stuck(self, running: Sequence[HeartbeatRecord]) -> StragglerReport | None:
        stuck = [record for record in running if is_late(record) and not record.is_waiting]
        return _report_on([(record, _stillness(record)) for record in stuck])

    def _deadlock(self, running: Sequence[HeartbeatRecord]) -> StragglerReport | None:
        late = [record for record in running if is_late(record)]
        if not late or len(late) < len(running):
            return None
        least = min(record.progress for record in late)
        behind = [record for record in late if record.progress == least]
        why = "every rank waits; furthest behind: "
        return _report_on([(record, why + _stillness(record)) for record in behind])


def is_late(record: HeartbeatRecord) -> bool:
    """Returns whether a rank has stood in an activity for nearly as long as it may."""
    return record.idle_s > MARGIN * record.allowed_s


def _stillness(record: HeartbeatRecord) -> str:
    return f"{record.describe()}; does not move for {record.idle_s:.0f} s, in {record.frame}"


def _report_on(stragglers: Sequence[tuple[HeartbeatRecord, str]]) -> StragglerReport | None:
    if not stragglers:
        return None
    more = f" (and {len(stragglers) - 1} more ranks)" if len(stragglers) > 1 else ""
    return StragglerReport(
        tuple(record.world_rank for record, _ in stragglers), stragglers[0][1] + more
    )


def end_ranks(records: Sequence[HeartbeatRecord]) -> None:
    """Ends the ranks among the processes of this host after they have written their stacks; a stopped one is woken for it.

    A process gets a signal only if it is the one that wrote the record: its number may be another's by now, or in this container.
    """
    running = [record for record in records if not record.end]
    _signal(running, signal.SIGUSR2, signal.SIGCONT)
    time.sleep(DUMP_S)
    _signal(running, signal.SIGKILL)


def _signal(records: Sequence[HeartbeatRecord], *signals: signal.Signals) -> None:
    for record in records:
        if record.process.is_here():
            with suppress(ProcessLookupError):
                for each in signals:
                    os.kill(record.pid, each)
