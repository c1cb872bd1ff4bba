"""The loop, read first: fetch, teach, exchange, learn, record, save.

Pretraining and distillation run in it alike; they differ in who teaches and in what happens after a
step. It looks at no tensor shape. A frozen teacher works up to ``lookahead`` steps ahead of the
students: its answers for later steps are the same now, so ranks whose students are quick fill the
time by teaching, and nobody waits for the slowest until the buffer of steps is empty. Everything
else stays inside a network's group, its faults too (``distill.train.faults``); stopping and saving are
agreed at the logging interval. The heartbeat says where the rank is, for the watchdog.
"""

from collections import deque

from distill.checkpoint.saver import Saver
from distill.runfolder.heartbeat import Heartbeat
from distill.train.exchange import Outgoing, Pending, student_batch
from distill.train.faults import FaultHandler
from distill.train.phase import Phase
from distill.train.recorder import Recorder
from teacher.batch import PatchMasks


def run_phase(
    phase: Phase,
    recorder: Recorder,
    saver: Saver,
    fault_handler: FaultHandler,
    heartbeat: Heartbeat,
    start_step: int,
) -> bool:
    """Runs the steps from ``start_step`` on; True when the phase is complete, False when a stop was asked for and saved."""
    on_the_way: deque[Pending] = deque()
    for step in range(start_step, phase.num_steps):
        stop = min(step + phase.lookahead + 1, phase.num_steps)
        for ahead in range(step + len(on_the_way), stop):
            on_the_way.append(_teach(phase, phase.first_step + ahead, heartbeat))
        heartbeat.enter("exchange", step)
        delivery = phase.exchange.wait(on_the_way.popleft())

        stream_step = phase.first_step + step
        for trainer in phase.trainers:
            if fault_handler.is_done(trainer, step):
                continue
            grid_hw = phase.grid_at(stream_step)
            batch = student_batch(
                delivery, trainer.placement, phase.world_rank, grid_hw, phase.plan.images_global
            )
            heartbeat.enter("learning", step, trainer.name)
            temperature, scalars = phase.temperature(stream_step), phase.scalars(stream_step)
            fault_handler.train_step(trainer, batch, temperature, scalars, stream_step)
        heartbeat.enter("post-step", step)
        phase.after_step(step + 1)

        heartbeat.enter("agreeing", step)
        wishes = recorder.record(phase, step + 1, fault_handler.counts())

        saver.report()
        if wishes.save or wishes.stop:
            heartbeat.enter("saving", step)
            fault_handler.before_save(step + 1)
            saver.save(phase, step + 1)
        if wishes.stop:
            return False
    return True


def _teach(phase: Phase, stream_step: int, heartbeat: Heartbeat) -> Pending:
    """Fetches this rank's share of a step, asks the teacher, and sends the answers on their way."""
    heartbeat.enter("loading", stream_step)
    crops = phase.loader.fetch(stream_step)
    masks = phase.masks.draw(stream_step)
    asked = masks.of_share
    if phase.exchange.wants_all_patches:
        asked = PatchMasks.all_of(asked)
    share = phase.plan_schedule.at(stream_step).share(phase.world_rank, stream_step)
    heartbeat.enter("teaching", stream_step)
    with phase.teaching.running(len(share)):
        targets = phase.teacher.teach(crops, asked)
    outgoing = Outgoing(stream_step, crops, targets, masks.of_needs, masks.counts)
    return phase.exchange.start(outgoing)
