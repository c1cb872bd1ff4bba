"""What a run reports: one status file, and a line of numbers per network and interval.

A screen, a test or a script on another machine reads these files and nothing else; training never
depends on a reader.

    status.json           the state of the run right now; replaced in one rename, never read half written
    timing.json           seconds and images of each phase
    metrics/<name>.jsonl  the history of one network; grows, so its last line may still be partial

Resuming goes back to a saved step. ``drop_after`` first removes the lines past it, so that a
history never holds a step twice. JSON has no NaN: a value that is not finite is written as null
and read back as NaN.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.runfolder.files import replace_text

RunState = Literal[
    "preparing",
    "training",
    "saving",
    "exporting",
    "evaluating",
    "finished",
    "stopped",
    "failed",
]
NetworkState = Literal["training", "waiting", "done", "stopped", "parked"]
TRAINED: frozenset[RunState] = frozenset({"exporting", "evaluating", "finished"})  # after all steps
FINAL_STATES: frozenset[RunState] = frozenset({"finished", "stopped", "failed"})
KNN_K = 5  # of the scores in ``summary.json``
TEACHER = "teacher"  # its name beside those of students
TRAINED_HEADS = "heads.safetensors"  # beside the weights of a teacher
STATUS_INTERVAL_S = 0.5  # an eye sees no difference below; a network disk does


@dataclass(frozen=True)
class PhaseStatus:
    """One stretch of steps with a fixed objective; ``weight`` is its share of the run's work."""

    name: str
    steps: int
    weight: float
    networks: tuple[str, ...]


@dataclass(frozen=True)
class NetworkStatus:
    """Where a network trains (world ranks), what it is doing right now, and its faults in this phase since the last start."""

    ranks: tuple[int, ...]
    state: NetworkState
    skipped: int = 0
    rolled_back: int = 0


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest complete checkpoint; ``path`` is relative to the run folder."""

    phase: str
    step: int
    path: str
    saved_unix: float


@dataclass(frozen=True)
class Status:
    """The state of the run at one time.

    ``step`` counts finished steps of ``phase``; ``phase`` is empty until the first one starts.
    ``loader_wait`` is the fraction of a step spent blocked on images; ``work_done`` runs from 0 to
    1 over all phases; ``eta_s`` is None while it is unknown.
    ``bad_samples`` counts those named in ``bad_samples.jsonl``.
    ``resume_command`` is what continues the run once it has stopped or failed.
    """

    state: RunState
    started_unix: float
    updated_unix: float
    phases: tuple[PhaseStatus, ...] = ()
    networks: Mapping[str, NetworkStatus] = field(default_factory=dict)
    phase: str = ""
    step: int = 0
    phase_started_unix: float | None = None
    step_s: float | None = None
    work_done: float = 0.0
    eta_s: float | None = None
    loader_wait: float = 0.0
    images_per_s: float = 0.0
    bad_samples: int = 0
    last_checkpoint: CheckpointStatus | None = None
    message: str = ""
    resume_command: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def ended(self, state: RunState, message: str) -> "Status":
        """The status of the run once it has ended so."""
        networks, now = networks_in(state, self.networks), time.time()
        return replace(self, state=state, message=message, networks=networks, updated_unix=now)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Status":
        """The status that ``to_json`` described.

        Raises:
            TypeError: a field is missing or unknown, so the file comes from another version.
        """
        fields = dict(values)
        fields["phases"] = tuple(
            PhaseStatus(**{**phase, "networks": tuple(phase["networks"])})
            for phase in fields["phases"]
        )
        fields["networks"] = {
            name: NetworkStatus(**{**entry, "ranks": tuple(entry["ranks"])})
            for name, entry in fields["networks"].items()
        }
        if fields["last_checkpoint"] is not None:
            fields["last_checkpoint"] = CheckpointStatus(**fields["last_checkpoint"])
        return cls(**fields)


def networks_in(state: RunState, networks: Mapping[str, NetworkStatus]) -> dict[str, NetworkStatus]:
    """Networks as they are once the run is in ``state``: done after all steps, stopped with the run, parked for good."""
    now: NetworkState | None = "done" if state in TRAINED else None
    if state in {"stopped", "failed"}:
        now = "stopped"
    return {
        name: network
        if now is None or network.state in {"parked", "done"}
        else replace(network, state=now)
        for name, network in networks.items()
    }


def work_done(phases: Sequence[PhaseStatus], phase: str, step: int) -> float:
    """Fraction of the run's work finished after ``step`` steps of ``phase``.

    Each phase counts by its weight, each step of a phase the same.

    Raises:
        ValueError: no phase has that name.
    """
    names = [entry.name for entry in phases]
    if phase not in names:
        raise ValueError(f"phase {phase!r} is not one of this run's phases: {', '.join(names)}")
    index = names.index(phase)
    current = phases[index]
    before = sum(entry.weight for entry in phases[:index])
    inside = current.weight * step / current.steps if current.steps else current.weight
    return (before + inside) / sum(entry.weight for entry in phases)


def note_time(run_folder: Path, phase: str, seconds: float, num_images: int) -> None:
    """Adds to the time and images of a phase in ``timing.json``; a run that was resumed adds up."""
    timing = read_times(run_folder)
    before = timing.get(phase, {"s": 0.0, "images": 0})
    timing[phase] = {"s": before["s"] + seconds, "images": before["images"] + num_images}
    write_json(run_folder / "timing.json", timing)


def read_times(run_folder: Path) -> dict[str, dict[str, float]]:
    """Returns seconds (``s``) and images of each phase; none where the file is missing or damaged."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run_folder / "timing.json").read_text(encoding="utf-8")))
    return {}


def write_json(path: Path, value: object) -> None:
    """Replaces ``path`` by ``value`` as JSON; a reader never sees half a file."""
    replace_text(path, json.dumps(without_nonfinite(value), indent=2, allow_nan=False) + "\n")


class StatusFile:
    """The run's ``status.json``: written by one process, read by any number."""

    def __init__(
        self,
        run_folder: Path,
        *,
        interval_s: float = STATUS_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the file; nothing is opened or created before the first write."""
        self.path = run_folder / "status.json"
        self._interval_s = interval_s
        self._clock = clock
        self._written_at = -math.inf
        self._written: Status | None = None

    def write(self, status: Status) -> bool:
        """Whether the status was written now.

        Progress is written at most every interval. What a reader must not miss is written at once:
        a change of state, phase, networks, last checkpoint or message. A disk that is full costs a
        status, not the run.
        """
        now = self._clock()
        if _is_same_event(self._written, status) and now - self._written_at < self._interval_s:
            return False
        try:
            write_json(self.path, status.to_json())
        except OSError:  # tried again at the next status
            return False
        self._written, self._written_at = status, now
        return True

    def mark_failed(self, message: str) -> None:
        """Replaces the newest status, if there is one, by that of a run that failed."""
        status = self.read()
        if status is not None:
            self.write(status.ended("failed", message))

    def read(self) -> Status | None:
        """The newest status, or None while the run has not written one, or the file is damaged.

        Raises:
            UserError: the file is there but does not describe a run of this version.
        """
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # empty after a power cut: written anew
            return None
        try:
            return Status.from_json(values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: does not describe a run of this version ({error})",
                fix="watch it with the version of distill that wrote it.",
            ) from error


def _is_same_event(before: Status | None, now: Status) -> bool:
    return before is not None and (
        before.state == now.state
        and before.phase == now.phase
        and before.networks == now.networks
        and before.last_checkpoint == now.last_checkpoint
        and before.message == now.message
    )


def without_nonfinite(value: object) -> object:
    """``value`` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(entry) for entry in value]
    return value
