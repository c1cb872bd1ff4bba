"""Feeds a tracker from the metric files of a run: while it trains, or afterwards.

    metrics/*.jsonl -> rows that the tracker has not had -> sink        trackers/NAME.json: how far each network is

A rank never waits for a tracker. A resumed run repeats rows bit for bit after its checkpoint; those
that the tracker has had are passed over, so its run continues as if there had been no stop.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.recipe.keys import is_family_phase
from distill.runfolder.files import make_folder
from distill.runfolder.metrics import MetricsRow
from distill.runfolder.progress import FIGURES, ScoredStep, read_progress
from distill.runfolder.status import StatusFile, write_json
from distill.screen.trackers import TRACKERS, TrackerSink, new_id

INTERVAL_S = 2.0
BLOCK_BYTES = 2**20


@dataclass
class RowFile:
    """A metric file that grows, and now and then is cut or replaced by a resume."""

    path: Path
    _offset: int = 0
    _inode: int = field(default=-1)

    def rows(self) -> Iterator[MetricsRow]:
        """Rows that were completed since the last call; all of them again after a resume. Damaged lines are passed over."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._inode, self._offset = facts.st_ino, 0
            file.seek(self._offset)
            while data := file.read(BLOCK_BYTES):
                complete = data[: data.rfind(b"\n") + 1]
                if not complete:
                    return
                self._offset += len(complete)
                file.seek(self._offset)
                for line in complete.splitlines():
                    with suppress(ValueError, KeyError, TypeError):
                        yield MetricsRow.from_json(json.loads(line))


class Follower:
    """One tracker of one run folder."""

    def __init__(self, run_folder: Path, tracker: str) -> None:
        """Reads how far an earlier follower came; opens nothing."""
        self._run_folder, self._open = run_folder, TRACKERS[tracker]
        self._path = run_folder / "trackers" / f"{tracker}.json"
        self._state: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            self._state = dict(json.loads(self._path.read_text(encoding="utf-8")))
        self._files: dict[str, RowFile] = {}
        self._sinks: dict[str, TrackerSink] = {}
        self._first_steps: dict[str, int] = {}
        self.num_rows = 0

    def poll(self) -> None:
        """Hands new rows on, and stores how far it came."""
        status = StatusFile(self._run_folder).read()
        steps = 0
        for phase in status.phases if status else ():
            self._first_steps[phase.name] = steps
            steps += phase.steps
        before = self.num_rows
        for path in sorted((self._run_folder / "metrics").glob("*.jsonl")):
            for row in self._files.setdefault(path.stem, RowFile(path)).rows():
                self._take(path.stem, row)
        for scored in read_progress(self._run_folder):
            self._take_scores(scored)
        if self.num_rows != before:
            make_folder(self._path.parent)
            write_json(self._path, self._state)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks.values():
            sink.close()

    def _take(self, network: str, row: MetricsRow) -> None:
        """Hands a row on at its step since the start of the run, unless the tracker has had it."""
        step = self._first_steps.get(row.phase, 0) + row.step
        state = self._state_of(network)
        if step <= state["step"]:
            return
        self._sink_of(network).write(replace(row, step=step))
        state["step"] = step
        self.num_rows += 1

    def _take_scores(self, scored: ScoredStep) -> None:
        """The same for the scores of a student, which come some time after their step."""
        state = self._state_of(scored.student)
        if scored.step <= state.get("scored_step", 0):
            return
        values = {name: value(scored) for name, (_, value) in FIGURES.items()}
        firsts = (step for phase, step in self._first_steps.items() if is_family_phase(phase))
        step = min(firsts, default=0) + scored.step
        found = {f"score/{name}": value for name, value in values.items() if value is not None}
        self._sink_of(scored.student).write_scores(step, found)
        state["scored_step"] = scored.step
        self.num_rows += 1

    def _state_of(self, network: str) -> dict[str, Any]:
        return self._state.setdefault(network, {"id": new_id(), "step": 0})

    def _sink_of(self, network: str) -> TrackerSink:
        """The open sink of a network."""
        if network not in self._sinks:
            state = self._state[network]
            done, run_id = int(state["step"]), str(state["id"])
            self._sinks[network] = self._open(self._run_folder, network, run_id, done)
        return self._sinks[network]


def follow(
    run_folder: Path, tracker: str, stop: threading.Event, *, interval_s: float = INTERVAL_S
) -> int:
    """Feeds a tracker until ``stop`` is set, then once more; the number of rows it got."""
    follower = Follower(run_folder, tracker)
    try:
        while True:
            is_last = stop.wait(0.0)
            follower.poll()
            if is_last:
                return follower.num_rows
            stop.wait(interval_s)
    finally:
        follower.close()
