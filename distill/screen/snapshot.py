"""What the files of a run say at one moment. Reads status, events, metrics, scores and, seldom, heartbeats."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.runfolder.events import Event, read_events
from distill.runfolder.heartbeat import last_beat_unix, read_records
from distill.runfolder.metrics import MetricsReader, MetricsRow
from distill.runfolder.progress import FILE, ScoredStep, read_progress
from distill.runfolder.status import FINAL_STATES, Status, StatusFile

SILENCE_S = (
    60.0  # without a new status (and ten steps' time) or a beat of any rank the job may be gone
)
LOOK_EVERY_S = 10.0  # heartbeats


@dataclass(frozen=True)
class RunSnapshot:
    """The contents of the files at one time; ``rows`` has every network of the status."""

    name: str
    status: Status | None
    rows: Mapping[str, Sequence[MetricsRow]]
    summary: Mapping[str, Any] | None
    now_unix: float
    alive_unix: float = 0.0  # when a rank's heartbeat last moved, looked up where the status is old
    events: Sequence[Event] = ()
    scores: Sequence[ScoredStep] = ()  # of students while they trained
    memory: Mapping[int, int] = field(default_factory=dict)  # bytes that each rank takes


class RunFiles:
    """Follows the files of one run folder, reading each history only once."""

    def __init__(
        self, run_folder: Path, *, since_unix: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        """Name the folder; no file need exist yet. A status from before ``since_unix`` is none."""
        self.run_folder = run_folder
        self.since_unix = since_unix
        self._clock = clock
        self._status_file = StatusFile(run_folder)
        self._alive_unix = self._looked_unix = 0.0
        self._readers: dict[str, MetricsReader] = {}
        self._scores: tuple[int, Sequence[ScoredStep]] = 0, ()
        self._memory: tuple[float, Mapping[int, int]] = 0.0, {}

    def take_snapshot(self) -> RunSnapshot:
        """The run as its files describe it now."""
        status = self._status_file.read()
        if status is not None and status.updated_unix < self.since_unix:
            status = None
        now_unix = self._clock()
        if status is not None and self._is_silent(status, now_unix):
            self._looked_unix = now_unix
            self._alive_unix = max(
                self._alive_unix, last_beat_unix(self.run_folder, now_unix - LOOK_EVERY_S)
            )
        for name in status.networks if status else ():
            reader = self._readers.setdefault(name, MetricsReader(self.run_folder, name))
            reader.poll()
        return RunSnapshot(
            name=self.run_folder.name,
            status=status,
            rows={name: reader.rows for name, reader in self._readers.items()},
            summary=self._read_summary() if status and status.state == "finished" else None,
            now_unix=now_unix,
            alive_unix=self._alive_unix,
            events=read_events(self.run_folder, since_unix=self.since_unix),
            scores=self._read_scores(),
            memory=self._read_memory(status, now_unix),
        )

    def _read_memory(self, status: Status | None, now_unix: float) -> Mapping[int, int]:
        """By rank, of a job at work; of a job that ended as it was."""
        is_due = now_unix - self._memory[0] >= LOOK_EVERY_S
        if is_due and status is not None and status.state not in FINAL_STATES:
            num_ranks = 1 + max(
                (max(n.ranks, default=0) for n in status.networks.values()), default=0
            )
            records = read_records(self.run_folder, num_ranks)
            found = {record.world_rank: record.memory_bytes for record in records}
            self._memory = now_unix, found
        return self._memory[1]

    def _read_scores(self) -> Sequence[ScoredStep]:
        """Read when the file is another one."""
        with suppress(OSError):
            changed_ns = (self.run_folder / FILE).stat().st_mtime_ns
            if changed_ns != self._scores[0]:
                self._scores = changed_ns, read_progress(self.run_folder)
        return self._scores[1]

    def _is_silent(self, status: Status, now_unix: float) -> bool:
        """Whether heartbeats, of which there may be thousands, are to be looked up."""
        if now_unix - self._looked_unix < LOOK_EVERY_S:
            return False
        return silence_s(RunSnapshot("", status, {}, None, now_unix, self._alive_unix)) > 0

    def _read_summary(self) -> Mapping[str, Any] | None:
        path = self.run_folder / "summary.json"
        if not path.exists():
            return None
        summary: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary


def silence_s(snapshot: RunSnapshot) -> float:
    """Seconds without news when that is long enough to say so, else 0."""
    status = snapshot.status
    if status is None or status.state in FINAL_STATES:
        return 0.0
    silence_s = snapshot.now_unix - max(status.updated_unix, snapshot.alive_unix)
    return silence_s if silence_s > max(SILENCE_S, 10 * (status.step_s or 0.0)) else 0.0
