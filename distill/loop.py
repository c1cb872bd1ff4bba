"""The loop, read first: fetch, teach, exchange, learn, record, save.

Pretraining and distillation run in it alike; they differ in who teaches and in what happens after a
step. It looks at no tensor shape. Every rank runs it in step: the exchange meets every step,
everything else stays inside a network's group, and stopping and saving are agreed at the logging
interval.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distill.data.loader import Loader
from distill.exchange import Exchange, lesson_for
from distill.masking import StepMasks
from distill.plan import Plan
from distill.pupil import Pupil
from distill.record import Recorder
from distill.saver import Saver
from teacher.frozen import FrozenTeacher
from teacher.trainee import StepScalars


@dataclass(frozen=True)
class Phase:
    """One stretch of steps with a fixed plan, teacher and objective, as one rank sees it.

    ``first_step`` is where this phase begins in the stream of samples; ``after_step`` updates what
    follows the trained weights (the EMA network and the Gram anchor of pretraining).
    """

    name: str
    num_steps: int
    first_step: int
    plan: Plan
    world_rank: int
    grid_hw: tuple[int, int]
    loader: Loader
    masks: StepMasks
    teacher: FrozenTeacher
    exchange: Exchange
    pupils: tuple[Pupil, ...]
    temperature: Callable[[int], float]
    scalars: Callable[[int], StepScalars]
    after_step: Callable[[int], None]


def run_phase(phase: Phase, recorder: Recorder, saver: Saver, start_step: int) -> bool:
    """Runs the steps from ``start_step`` on; True when the phase is complete, False when a stop was asked for and saved."""
    for step in range(start_step, phase.num_steps):
        stream_step = phase.first_step + step

        crops = phase.loader.fetch(stream_step)

        masks = phase.masks.draw(stream_step)
        targets = phase.teacher.teach(crops, masks.of_share)

        delivery = phase.exchange.deliver(crops, targets, masks.of_needs, masks.counts)

        temperature = phase.temperature(stream_step)
        for pupil in phase.pupils:
            lesson = lesson_for(
                delivery, pupil.placement, phase.world_rank, phase.grid_hw, phase.plan.images_global
            )
            pupil.learn(lesson, temperature, phase.scalars(stream_step), stream_step)
        phase.after_step(step + 1)

        wishes = recorder.record(phase, step + 1)

        if wishes.save or wishes.stop:
            saver.save(phase, step + 1)
        if wishes.stop:
            return False
    return True
