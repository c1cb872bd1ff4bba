"""One stretch of steps, as one rank sees it, and what the loop asks of everything that it drives.

The protocols are all that the loop knows of a teacher, a loader, a network in training, a recorder: a
benchmark or a test puts something else in their place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from distill.plan.plan import Plan
from distill.plan.slices import Placement
from distill.runfolder.saver import NONE_HELD, Saveable, States
from distill.train.by_step import PlanSchedule
from distill.train.exchange import Exchange
from distill.train.masking import DrawnMasks
from distill.train.schedule import StepNumbers
from distill.train.student import Attempt, Snapshot, Stopwatch
from teacher.batch import CropBatch, PatchMasks, StudentBatch, TeacherTargets


@runtime_checkable
class Schedule(Protocol):
    """Numbers of each step; ``distill.train.schedule``."""

    def at(self, run_step: int) -> StepNumbers:
        """All numbers of a step in the stream of samples."""
        ...


@runtime_checkable
class CropLoader(Protocol):
    """This rank's share of each step's images; ``distill.data.loader``. ``wait_s`` accumulates."""

    wait_s: float

    def fetch(self, step: int) -> CropBatch:
        """The crops of a step in the stream of samples; waits for them."""
        ...

    def make_room(self, max_images: int) -> None:
        """Prepares for larger shares."""
        ...

    def close(self) -> None:
        """Ends its processes."""
        ...


@runtime_checkable
class MaskSource(Protocol):
    """Masks of each step; ``distill.train.masking``."""

    def draw(self, step: int) -> DrawnMasks:
        """The masks of a step in the stream of samples."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Makes the targets; ``teacher.frozen``."""

    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        """Targets of some images: class rows, and rows of the patches in ``masks``."""
        ...

    def is_finite_here(self) -> Tensor:
        """Every weight that this rank holds is finite, on the device. No communication."""
        ...

    def anchor_state(self) -> dict[str, Tensor]:
        """The Gram anchor's weights by name, nothing without one. Collective where it is sharded."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """A network in training on this rank; ``distill.train.student``."""

    @property
    def name(self) -> str:
        """Its label in the recipe."""
        ...

    @property
    def placement(self) -> Placement:
        """Where it trains."""
        ...

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that train it."""
        ...

    @property
    def training(self) -> Stopwatch:
        """Seconds of its steps."""
        ...

    @property
    def images(self) -> range:
        """Positions of the global batch that this rank trains it on."""
        ...

    @property
    def largest_part(self) -> int:
        """Images of the largest micro-batch here."""
        ...

    @property
    def least_part(self) -> int:
        """Images of the smallest micro-batch that it can be trained with."""
        ...

    @property
    def stop_step(self) -> int | None:
        """The step of the phase from which on it is finished; None where the phase ends it."""
        ...

    def train_step(self, batch: StudentBatch, numbers: StepNumbers) -> Attempt:
        """One step on its slice. Collective over its group."""
        ...

    def forget_step(self) -> None:
        """Counts the last step, which was skipped, no more: it is trained again."""
        ...

    def read_metrics(self, wait: float) -> dict[str, float] | None:
        """Means since the last call, None without a step. Collective over its group."""
        ...

    @property
    def is_alone(self) -> bool:
        """No other rank trains it."""
        ...

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of its state in host memory. No communication."""
        ...

    def judged_snapshot(self, into: Snapshot | None) -> tuple[Snapshot, bool]:
        """A snapshot, and whether it is finite, of a network that trains on this rank alone."""
        ...

    def restore_snapshot(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot. Collective over its group."""
        ...

    def is_finite(self) -> bool:
        """All of its state is finite. Collective over its group."""
        ...

    def is_finite_here(self) -> Tensor:
        """The same of what this rank holds, on the device. No communication."""
        ...

    def steps_applied(self) -> int:
        """How many steps made its state. Waits for the device."""
        ...

    def ema(self, *, collect: bool = True) -> dict[str, Tensor]:
        """The average of its weights by name, nothing without ``collect``. Collective over its group."""
        ...

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Full tensors by name, nothing without ``collect``; written over those of ``into``. Collective over its group."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``. No communication."""
        ...


@dataclass(frozen=True)
class Phase:
    """One stretch of steps with a teacher and an objective, as one rank sees it.

    A step is counted in two ways: ``phase_step`` from the beginning of the phase, ``run_step`` in the stream
    of samples, where the phase begins at ``first_step``. ``after_step``, if any, is called with the number of
    finished steps of the phase: in pretraining it updates what follows the trained weights (the EMA
    network that teaches, the Gram anchor), which is why such a phase looks no step ahead; in a
    family it re-plans the shares. ``has_frozen_teacher``: what it teaches is the same at any time, so a
    step's targets can be computed once more later on.
    """

    name: str
    num_steps: int
    first_step: int
    lookahead: int
    plan: Plan
    plan_schedule: PlanSchedule
    world_rank: int
    schedule: Schedule
    loader: CropLoader
    masks: MaskSource
    teacher: Teacher
    teaching: Stopwatch
    exchange: Exchange
    trainers: tuple[Trainer, ...]
    after_step: Callable[[int], None] | None
    has_frozen_teacher: bool = False


@dataclass(frozen=True)
class Decision:
    """What the world agreed to do after this step; the end of a phase is saved without a request."""

    save: bool
    stop: bool


@runtime_checkable
class StepRecorder(Protocol):
    """Takes the numbers of finished steps; ``distill.train.recorder``."""

    def record(self, phase: Phase, step: int, faults: Callable[[], Sequence[float]]) -> Decision:
        """Counts ``step`` finished steps of the phase and returns what to do now, the same on every rank."""
        ...


@runtime_checkable
class StepSaver(Protocol):
    """Writes checkpoints; ``distill.runfolder.saver``."""

    def report(self) -> None:
        """Reports how a finished save ended."""
        ...

    def wait(self) -> None:
        """Returns when no save is under way."""
        ...

    def save(self, phase: Saveable, step: int, held: States = NONE_HELD) -> None:
        """Begins to save after ``step`` finished steps of the phase. Collective."""
        ...


@runtime_checkable
class StepCopies(Protocol):
    """Copies the state into the memory of other nodes; ``distill.engine.peer_copies``."""

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` finished steps of a phase are copied; the same on every rank."""
        ...

    def copy(self, phase: Saveable, step: int) -> None:
        """Begins to copy after ``step`` finished steps of the phase. Collective."""
        ...


@runtime_checkable
class Faults(Protocol):
    """Keeps a fault of one network away from the others; ``distill.train.faults``."""

    def is_training(self, trainer: Trainer, phase_step: int) -> bool:
        """The network is neither finished nor parked. Collective over its group."""
        ...

    def isolate(self, trainer: Trainer, error: Exception, phase_step: int) -> None:
        """Parks a network whose step raised. Raises the error where it is not that network's alone."""
        ...

    def watch(
        self, trainer: Trainer, batch: StudentBatch, attempt: Attempt, phase_step: int
    ) -> None:
        """Sends for the flag of a step. No waiting."""
        ...

    def before_save(self, phase_step: int, *, takes_snapshot: bool = True) -> States:
        """Makes every state one that can be saved; those that are in host memory then, by network. Collective."""
        ...

    def counts(self) -> list[float]:
        """Of every network of the phase: steps skipped, times rolled back, parked (1)."""
        ...


@runtime_checkable
class ActivityLog(Protocol):
    """Takes what the rank is doing; ``distill.runfolder.heartbeat``."""

    def enter(self, activity: str, phase_step: int, network: str = "") -> None:
        """Begins another activity."""
        ...
