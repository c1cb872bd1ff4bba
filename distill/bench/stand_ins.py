"""What a benchmark puts in the place of images, networks, the recorder, the saver and the heartbeat."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill.bench.turns import rank_factors
from distill.data.crops import NUM_GLOBAL
from distill.errors import CheckpointError
from distill.plan.slices import Placement
from distill.recipe.keys import FamilyRecipe
from distill.runfolder.saver import NONE_HELD, CheckpointPolicy, Saveable, Saver, States
from distill.runfolder.status import RunState
from distill.train.phase import Decision, Phase
from distill.train.schedule import StepNumbers
from distill.train.student import Attempt, Snapshot, Stopwatch
from teacher.batch import CropBatch, PatchMasks, StudentBatch, TeacherTargets

POOL = 64  # different synthetic images; a loader that only copies is not what is measured


class Mark(NamedTuple):
    """The clocks of a rank at the end of a step: the time, sums of seconds and bytes so far, and of the seconds those of each network's training."""

    time_s: float
    teaching_s: float
    training_s: float
    exchange_wait_s: float
    loader_wait_s: float
    received_bytes: int
    network_s: Mapping[str, float]


class Turn(NamedTuple):
    """What a rank measured in one block of steps of a mode: the clocks before and after the counted steps, seconds of all of it.

    ``stall_s``: what the loop waited for a save; zero where none was made.
    """

    first: Mark
    last: Mark
    num_steps: int
    wall_s: float
    stall_s: float


class Witness:
    """Stands in for the recorder: notes when each step ended, reads the clocks after some, and requests one save."""

    def __init__(self, read_after: Collection[int] = (), save_after: int | None = None) -> None:
        """Numbers of steps after which to read the clocks, which waits for the device, and to save (None: never)."""
        self.ends_s: list[float] = []
        self.marks: list[Mark] = []
        self._read_after, self._save_after = read_after, save_after

    def record(
        self,
        phase: Phase,
        step: int,
        faults: Callable[[], Sequence[float]],
    ) -> Decision:
        """One step is over."""
        del step, faults  # it counts the steps of its block itself
        num_steps = len(self.ends_s) + 1
        if num_steps in self._read_after:
            teaching_s = phase.teaching.read_s()
            network_s = {trainer.name: trainer.training.read_s() for trainer in phase.trainers}
            exchange, loader = phase.exchange, phase.loader
            self.marks.append(
                Mark(
                    time.monotonic(),
                    teaching_s,
                    sum(network_s.values()),
                    exchange.wait_s,
                    loader.wait_s,
                    exchange.received_bytes,
                    network_s,
                )
            )
        self.ends_s.append(time.monotonic())
        return Decision(save=num_steps == self._save_after, stop=False)


class Span(NamedTuple):
    """What a rank was doing from when to when, on the clock that all processes of a machine share."""

    start_s: float
    stop_s: float
    activity: str
    network: str


class Trace:
    """Stands in for the heartbeat and writes down what the loop reports. Waits for the device at every turn, so that work counts where it was started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turns: list[tuple[float, str, str]] = []

    def enter(self, activity: str, phase_step: int, network: str = "") -> None:
        """Begins another activity."""
        del phase_step  # one step is drawn
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._turns.append((time.monotonic(), activity, network))

    def spans(self, window: tuple[float, float]) -> list[Span]:
        """What was done within some time, from its start on."""
        start_s, stop_s = window
        ends = [turn[0] for turn in self._turns[1:]] + [stop_s]
        return [
            Span(max(began, start_s) - start_s, min(ended, stop_s) - start_s, activity, network)
            for (began, activity, network), ended in zip(self._turns, ends, strict=True)
            if min(ended, stop_s) > max(began, start_s)
        ]


class Unsaved:
    """Stands in for the saver: nothing is saved, so there is nothing to report or to wait for."""

    def report(self) -> None:
        """No save has ended."""

    def save(self, phase: Saveable, step: int, held: States = NONE_HELD) -> None:
        """Is never called: the recorder beside it requests no save."""
        del held
        raise AssertionError(f"{phase.name}: a save at step {step} without a request")

    def wait(self) -> None:
        """No save is under way."""


class TimedSaver(Saver):
    """The real saver, which notes when it let go of the loop; a save that fails ends the benchmark."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            CheckpointPolicy(folder / "checkpoints", "", {}, "", 2, None), _Strict(), None
        )
        self.returned_s = 0.0

    def save(self, phase: Saveable, step: int, held: States = NONE_HELD) -> None:
        """As the saver's."""
        super().save(phase, step, held)
        self.returned_s = time.monotonic()


class _Strict:
    """Listens to the saver."""

    def show(self, state: RunState) -> None:
        """Does nothing: no watchdog reads it."""

    def saving(self) -> None:
        """As expected."""

    def saved(self, phase: str, step: int, path: str) -> None:
        """As expected."""

    def unsaved(self, message: str) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(message)


class SyntheticLoader:
    """Random pixels in the place of photographs: no files, no decoder."""

    def __init__(
        self,
        recipe: FamilyRecipe,
        phase: Phase,
        world_rank: int,
        device: torch.device,
        *,
        is_tiny: bool,
    ) -> None:
        self.wait_s = 0.0
        self._plan_schedule, self._rank = phase.plan_schedule, world_rank
        generator = torch.Generator().manual_seed(0)

        def pixels(count: int, size: int) -> Tensor:
            side = 1 if is_tiny else size
            shape = (POOL, count, 3, side, side)
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

        crops = recipe.crops
        self._pool = CropBatch(
            pixels(NUM_GLOBAL, crops.global_.size), pixels(crops.local.count, crops.local.size)
        )

    def fetch(self, step: int) -> CropBatch:
        """The crops of this rank's share."""
        share = self._plan_schedule.at(step).share(self._rank, step)
        ids = torch.arange(share.start, share.stop, device=self._pool.global_crops.device) % POOL
        return CropBatch(self._pool.global_crops[ids], self._pool.local_crops[ids])

    def make_room(self, max_images: int) -> None:
        """Nothing to do: any share fits."""

    def close(self) -> None:
        """Nothing to let go of."""


class Jitter:
    """The factor of a sleeping rank's work, another one from each teaching on."""

    def __init__(self, jitter: float, world_rank: int) -> None:
        self._next, self.factor = rank_factors(jitter, world_rank), 1.0

    def renew(self) -> None:
        """The next factor."""
        self.factor = float(self._next()[0])


NO_JITTER = Jitter(0.0, 0)


class SleepingTeacher:
    """Sleeps for every image and returns constant features."""

    def __init__(self, image_s: float, jitter: Jitter) -> None:
        self._image_s, self._jitter = image_s, jitter

    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        """Zeros, one number per token."""
        self._jitter.renew()
        num_images = len(crops.global_crops)
        time.sleep(num_images * self._image_s * self._jitter.factor)
        return TeacherTargets(
            torch.zeros(num_images, NUM_GLOBAL, 1), torch.zeros(sum(masks.counts), 1)
        )

    def is_finite_here(self) -> Tensor:
        """It has no weights."""
        return torch.ones((), dtype=torch.bool)

    def anchor_state(self) -> dict[str, Tensor]:
        """It has no anchor."""
        return {}


class SleepingStudent:
    """Takes its time for its slice, and meets the others of its group as gradients would. It has no weights."""

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup,
        image_s: float,
        world_rank: int,
        jitter: Jitter = NO_JITTER,
    ) -> None:
        self._jitter = jitter
        self.name, self.placement, self.group = placement.name, placement, group
        self.training = Stopwatch(torch.device("cpu"))
        self.images, self.stop_step = placement.slice_of(world_rank), None
        self._seconds = len(self.images) * image_s

    @property
    def largest_part(self) -> int:
        """All of its slice at once."""
        return len(self.images)

    @property
    def least_part(self) -> int:
        """The same: it is not cut."""
        return self.largest_part

    def train_step(self, batch: StudentBatch, numbers: StepNumbers) -> Attempt:
        """Sleeps, then one all-reduce over the group."""
        del batch, numbers  # its time is that of the plan
        with self.training.running():
            time.sleep(self._seconds * self._jitter.factor)
        dist.all_reduce(torch.zeros(1), group=self.group)
        return Attempt(is_applied=torch.ones((), dtype=torch.bool), terms={})

    def forget_step(self) -> None:
        """It counts nothing."""

    def read_metrics(self, wait: float) -> dict[str, float]:
        """Only what it is given."""
        return {"wait": wait}

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """Nothing to copy."""
        return into or Snapshot({}, [], {})

    @property
    def is_alone(self) -> bool:
        """It has nothing that could be held."""
        return False

    def judged_snapshot(self, into: Snapshot | None) -> tuple[Snapshot, bool]:
        """Nothing to judge."""
        return self.snapshot(into), True

    def restore_snapshot(self, snapshot: Snapshot) -> None:
        """There is nothing to go back to."""
        assert not snapshot.engine, "no weights"

    def is_finite(self) -> bool:
        """It has no number that could be anything else."""
        return True

    def steps_applied(self) -> int:
        """None."""
        return 0

    def is_finite_here(self) -> Tensor:
        """The same on the device."""
        return torch.ones((), dtype=torch.bool)

    def ema(self, *, collect: bool = True) -> dict[str, Tensor]:
        """No weights."""
        return self.state(collect=collect)

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """No weights."""
        del collect, into  # nothing either way
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """There is nothing to load into."""
        assert not tensors, "no weights"
