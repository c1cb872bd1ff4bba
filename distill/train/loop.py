"""The loop, read first: fetch, teach, exchange, learn, record, save.

Pretraining and distillation run in it alike; they differ in who teaches and in what happens after a
step. It looks at no tensor shape. A frozen teacher works up to ``lookahead`` steps ahead of the
students: its answers for later steps are the same now, so ranks whose students are quick fill the
time by teaching, and no rank waits for the slowest until the buffer of steps is empty. Everything
else stays inside a network's group, its faults too (``distill.train.faults``); stopping and saving are
agreed at the logging interval. The heartbeat shows where the rank is, for the watchdog.
"""

from collections import deque

from distill.train.exchange import Outgoing, Pending
from distill.train.phase import ActivityLog, Faults, Phase, StepCopies, StepRecorder, StepSaver
from teacher.batch import PatchMasks, student_batch


def run_phase(
    phase: Phase,
    recorder: StepRecorder,
    saver: StepSaver,
    fault_handler: Faults,
    heartbeat: ActivityLog,
    start_step: int,
    copies: StepCopies | None = None,
) -> bool:
    """Runs the steps from ``start_step`` on; True when the phase is complete, False when a stop was requested and saved."""
    on_the_way: deque[Pending] = deque()
    for phase_step in range(start_step, phase.num_steps):
        run_step = phase.first_step + phase_step
        num_ahead = min(phase.lookahead + 1, phase.num_steps - phase_step)
        for ahead in range(len(on_the_way), num_ahead):
            heartbeat.enter("loading", phase_step)
            crops = phase.loader.fetch(run_step + ahead)
            masks = phase.masks.draw(run_step + ahead)
            required = masks.of_share
            if phase.exchange.wants_all_patches:
                required = PatchMasks.all_of(required)
            heartbeat.enter("teaching", phase_step)
            with phase.teaching.running(crops.global_crops.shape[0]):
                targets = phase.teacher.teach(crops, required)
            outgoing = Outgoing(run_step + ahead, crops, targets, masks.of_required, masks.counts)
            on_the_way.append(phase.exchange.start(outgoing))
        heartbeat.enter("exchange", phase_step)
        delivery = phase.exchange.wait(on_the_way.popleft())

        numbers = phase.schedule.at(run_step)
        for trainer in phase.trainers:
            heartbeat.enter("learning", phase_step, trainer.name)
            if not fault_handler.is_training(trainer, phase_step):
                continue
            images, grid_hw = trainer.images, numbers.grid_hw
            batch = student_batch(delivery, images, grid_hw, phase.plan.images_global)
            try:
                attempt = trainer.train_step(batch, numbers)
            except Exception as error:
                fault_handler.isolate(trainer, error, phase_step)
            else:
                fault_handler.watch(trainer, batch, attempt, phase_step)
        if phase.after_step is not None:
            heartbeat.enter("post-step", phase_step)
            phase.after_step(phase_step + 1)

        heartbeat.enter("agreeing", phase_step)
        decision = recorder.record(phase, phase_step + 1, fault_handler.counts)
        saver.report()
        if copies is not None and copies.is_due(phase_step + 1, phase.num_steps):
            heartbeat.enter("saving", phase_step)
            fault_handler.before_save(phase_step + 1, takes_snapshot=False)
            copies.copy(phase, phase_step + 1)
        if decision.save or decision.stop:
            heartbeat.enter("saving", phase_step)
            saver.wait()  # what it writes is written over next
            saver.save(phase, phase_step + 1, fault_handler.before_save(phase_step + 1))
        if decision.stop:
            return False
    return True
