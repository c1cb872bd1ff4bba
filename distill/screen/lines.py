"""A run as plain lines: each event once, progress now and then."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.runfolder.status import FINAL_STATES, Status
from distill.screen.results import agreement_lines, conclusion_lines
from distill.screen.snapshot import RunSnapshot, silence_s
from distill.screen.tables import BASELINES, score_rows, score_text, unfinished_students
from distill.screen.words import clock_time, duration, number_text, rate_text, time_of_day

PROGRESS_FRACTION = 0.1  # a plain progress line at least this often ...
PROGRESS_S = 15.0  # ... or after this time, stretched to 2 % of the elapsed time on long runs


class Narrator:
    """Turns snapshots into lines, each event once."""

    def __init__(self, since_unix: float = 0.0) -> None:
        """Nothing has been printed; what happened before ``since_unix`` never is."""
        self._since_unix = since_unix
        self._status: Status | None = None
        self._printed_work = 0.0
        self._printed_unix = -math.inf
        self._has_printed_silence = False
        self._num_events = 0

    def lines(self, snapshot: RunSnapshot) -> list[str]:
        """The lines for what happened since the last snapshot, oldest first, each with the time when it happened."""
        before, now = self._status, snapshot.status
        fresh = snapshot.events[self._num_events :]
        self._num_events += len(fresh)
        happened = [(event.time_unix, event.text) for event in fresh]
        if now is not None:
            happened += self._changes(before, snapshot, now)
        quiet_s = silence_s(snapshot)
        if quiet_s and not self._has_printed_silence:
            text = f"no news for {duration(quiet_s)}: is the job still running?"
            happened.append((snapshot.now_unix, text))
        self._has_printed_silence = bool(quiet_s)
        self._status = now or before
        happened = [entry for entry in happened if entry[0] >= self._since_unix]
        return _stamped(sorted(happened, key=lambda entry: entry[0]), snapshot.now_unix)

    def _changes(
        self, before: Status | None, snapshot: RunSnapshot, now: Status
    ) -> list[tuple[float, str]]:
        """What the status has that the one before had not."""
        happened = []
        if now.last_checkpoint and (
            before is None or before.last_checkpoint != now.last_checkpoint
        ):
            saved = now.last_checkpoint
            text = f"saved {saved.path} ({saved.phase} step {saved.step})"
            happened.append((saved.saved_unix, text))
        if now.phase and (before is None or before.phase != now.phase):
            happened.append((now.phase_started_unix or now.updated_unix, _phase_line(now)))
            self._note_progress(now)
        if now.bad_samples and (before is None or before.bad_samples < now.bad_samples):
            text = f"{now.bad_samples:,} bad samples so far, named in bad_samples.jsonl"
            happened.append((now.updated_unix, text))
        if self._is_progress_due(now):
            happened.append((now.updated_unix, _progress_line(snapshot)))
            self._note_progress(now)
        if before is None or (before.state, before.message) != (now.state, now.message):
            happened += [(now.updated_unix, line) for line in _state_lines(before, snapshot)]
        return happened

    def _note_progress(self, status: Status) -> None:
        self._printed_work, self._printed_unix = status.work_done, status.updated_unix

    def _is_progress_due(self, now: Status) -> bool:
        if now.state != "training" or now.work_done <= self._printed_work:
            return False
        gap_s = max(PROGRESS_S, 0.02 * (now.updated_unix - now.started_unix))
        return (
            now.work_done - self._printed_work >= PROGRESS_FRACTION
            or now.updated_unix - self._printed_unix >= gap_s
        )


def _stamped(happened: Sequence[tuple[float, str]], now_unix: float) -> list[str]:
    stamps = [f"{time_of_day(unix, now_unix)}  " for unix, _ in happened]
    return [  # what a message holds after its first line is not to be taken for a line of the run
        stamp + text.replace("\n", "\n" + " " * len(stamp))
        for stamp, (_, text) in zip(stamps, happened, strict=True)
    ]


def _phase_line(status: Status) -> str:
    names = [phase.name for phase in status.phases]
    index = names.index(status.phase)
    phase = status.phases[index]
    who = ", ".join(phase.networks)
    return f"phase {phase.name} ({index + 1} of {len(names)}): {phase.steps} steps of {who}"


def _progress_line(snapshot: RunSnapshot) -> str:
    status = snapshot.status
    assert status is not None, "progress of a run without a status"
    steps = next(phase.steps for phase in status.phases if phase.name == status.phase)
    facts = [f"{status.phase} step {status.step}/{steps}", f"{status.work_done:.0%} of the run"]
    losses = [
        f"{name} {number_text(rows[-1].loss)}"
        for name, rows in snapshot.rows.items()
        if rows and rows[-1].phase == status.phase
    ]
    if losses:
        facts.append(f"loss {' '.join(losses)}")
    facts.append(f"{rate_text(status.images_per_s)} images/s")
    if status.eta_s is not None:
        end = clock_time(snapshot.now_unix + status.eta_s, snapshot.now_unix)
        facts.append(f"ends {end} (in {duration(status.eta_s)})")
    return ", ".join(facts)


def _state_lines(before: Status | None, snapshot: RunSnapshot) -> list[str]:
    now = snapshot.status
    assert now is not None, "state of a run without a status"
    lines = []
    if now.state == "finished":
        lines += _score_lines(snapshot.summary) if snapshot.summary else []
        lines.append(f"finished after {duration(now.updated_unix - now.started_unix)}")
    elif now.state in FINAL_STATES:
        lines.append(f"{now.state} at {now.phase or 'the start'} step {now.step}")
    elif now.state not in {"training", "saving"} and not now.message:
        lines.append(now.state)
    if now.message and (before is None or before.message != now.message):
        lines.append(f"{now.state}: {now.message}" if now.state != "training" else now.message)
    if now.state in {"stopped", "failed"} and now.resume_command:
        lines.append(f"resume with: {now.resume_command}")
    return lines


def _score_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"k-NN {name}: {score_text(knn)} (untrained {score_text(untrained)})"
        for name, knn, untrained, _ in score_rows(summary)
    ]
    baselines = summary.get("baselines", {})
    lines += [
        f"k-NN {label}: {score_text(baselines[key])}"
        for key, label in BASELINES.items()
        if key in baselines
    ]
    if summary.get("knn_reason"):
        lines.append(f"no k-NN scores: {summary['knn_reason']}")
    return [
        *agreement_lines(summary),
        *lines,
        *conclusion_lines(summary),
        *unfinished_students(summary, has_reason=True),
    ]
