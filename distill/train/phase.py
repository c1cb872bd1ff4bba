"""One stretch of steps, as one rank sees it: everything that the loop asks."""

from collections.abc import Callable
from dataclasses import dataclass

from distill.data.loader import Loader
from distill.plan.by_step import PlanSchedule
from distill.plan.plan import Plan
from distill.train.exchange import Exchange
from distill.train.masking import StepMasks
from distill.train.stopwatch import Stopwatch
from distill.train.student import StudentTrainer
from teacher.frozen import FrozenTeacher
from teacher.task import StepScalars


@dataclass(frozen=True)
class Phase:
    """One stretch of steps with a teacher and an objective, as one rank sees it.

    ``first_step`` is where this phase begins in the stream of samples; ``grid_at`` is the teacher's patch
    grid at a step of it. ``after_step`` gets the
    number of finished steps: in pretraining it updates what follows the trained weights (the EMA
    network that teaches, the Gram anchor), which is why such a phase looks no step ahead; in a
    family it re-plans the shares.
    """

    name: str
    num_steps: int
    first_step: int
    lookahead: int
    plan: Plan
    plan_schedule: PlanSchedule
    world_rank: int
    grid_at: Callable[[int], tuple[int, int]]
    loader: Loader
    masks: StepMasks
    teacher: FrozenTeacher
    teaching: Stopwatch
    exchange: Exchange
    trainers: tuple[StudentTrainer, ...]
    temperature: Callable[[int], float]
    scalars: Callable[[int], StepScalars]
    after_step: Callable[[int], None]
