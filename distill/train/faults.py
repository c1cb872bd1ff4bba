"""A fault of one network does not reach the others: skip the step, roll back, park.

    not finite: loss, gradient, weight         the group skips the step; nothing changes
    IN_A_ROW skipped steps                     back to the last good state, which is kept in host memory
    ROLL_BACKS times back to the same state    parked: it keeps that state, its ranks go on teaching
    out of memory                              a new start with micro-batches of half the images
    an exception, no smaller micro-batch       parked at once
    teacher features are not finite            the rank that made them is to blame, no student

Features are computed once more on the ranks that received them, and the step, which has changed nothing,
is trained again before the next one: the students end with the bits of a run without the fault. The
job ends where that does not help, and when the same rank does it again. An EMA that teaches has moved on by
then: its step stays skipped, and the second time ends the job. What all ranks see there is no rank's fault.

The agreement to skip costs nothing: a rank that sees something that is not finite spoils its
gradients, and the norm that the group reduces anyway is not finite (``distill.engine.engine``). The host
reads it when the network's next step is about to begin, so that a device never runs dry while it
is read. Everything after that follows from which steps were skipped, the same on every rank of the
group. What was wrong is looked for only then: a few device syncs and one small all-reduce.

An exception on one rank of a larger group leaves the others inside a collective that gloo cannot
leave. That student is parked by a file and the attempt ends; the next one, which the launcher starts
at once, goes on without it from the last checkpoint. Alone on its rank it is parked in place. Out of memory, the
attempt ends in both cases, because only a new process lets go of everything (``distill.engine.micro_batches``).

The last good state is refreshed at every save, before which each network shows that it is finite:
what is saved can be gone on from. Of a network that one rank trains there is one copy for both: it is
made in the memory that holds no good state, judged meanwhile, saved, and if it is good it is the state to go
back to from then on. Parked networks are named in ``parked/<name>.json`` of the run
folder; a person may delete that file to have one tried again.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.micro_batches import smaller_part, write_micro_batch
from distill.errors import StudentError
from distill.runfolder.events import Event, EventKind, note, read_events
from distill.runfolder.failure import is_lost_connection
from distill.runfolder.parked import Parked, is_parked, write_parked
from distill.train.phase import Phase, Trainer
from distill.train.producers import Cause, PendingStep, Producers
from distill.train.student import Attempt, Snapshot
from teacher.batch import StudentBatch

IN_A_ROW = 3
ROLL_BACKS = 3


class AppliedFlag:
    """Whether a step was applied, on its way to the host: reading it waits for that step, not for what was started after it."""

    def __init__(self) -> None:
        self._host_flag: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def send(self, is_applied: Tensor) -> None:
        """Starts on its way what the device will know. No waiting."""
        if self._host_flag is None:
            self._host_flag = torch.empty((), dtype=torch.bool, pin_memory=is_applied.is_cuda)
            self._value = self._host_flag.numpy()  # shows what arrives in the tensor
        self._host_flag.copy_(is_applied, non_blocking=True)
        if is_applied.is_cuda:
            self._sent = torch.cuda.current_stream(is_applied.device).record_event(self._sent)

    def read(self) -> bool:
        """What was sent last."""
        if self._sent is not None:
            self._sent.synchronize()
        return bool(self._value)


@dataclass
class _Record:
    """How one network fares on this rank; the same on every rank of its group."""

    applied: AppliedFlag = field(default_factory=AppliedFlag)
    pending: PendingStep | None = None
    snapshot: Snapshot | None = None
    spare: Snapshot | None = None  # memory of the next one, where one rank trains the network
    snapshot_step: int = 0
    in_a_row: int = 0
    num_skipped: int = 0
    num_rolled_back: int = 0
    num_roll_backs: int = 0
    has_moved: bool = False
    is_parked: bool = False
    blamed: set[int] = field(default_factory=set)  # ranks whose features were not finite once

    def count_from(self, phase_step: int) -> None:
        """Notes that the snapshot is of this step."""
        if self.has_moved:
            self.num_roll_backs = 0
        self.snapshot_step, self.has_moved = phase_step, False


class FaultHandler:
    """The networks that this rank trains in one phase."""

    def __init__(
        self, phase: Phase, run_folder: Path, teacher_source: str = "the teacher's weights"
    ) -> None:
        """``teacher_source``: what to name where every rank's features are not finite."""
        self._phase, self._run_folder = phase, run_folder
        self._producers = Producers(phase, run_folder, teacher_source)
        self._records = {trainer.name: _Record() for trainer in phase.trainers}

    def start(self, phase_step: int, control: dist.ProcessGroup) -> dict[str, dict[str, Tensor]]:
        """Keeps the states to go back to, and learns who was parked before; states as ``before_save`` returns them. One all-reduce over the world."""
        names = [placement.name for placement in self._phase.plan.placements]
        flags = torch.tensor([float(is_parked(self._run_folder, n)) for n in names])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=control)
        for trainer in self._phase.trainers:
            record = self._records[trainer.name]
            record.is_parked = bool(flags[names.index(trainer.name)])
            self._take_snapshot(trainer, phase_step)
            if trainer.is_alone:
                record.spare = trainer.snapshot()
        return self._held_states()

    def is_training(self, trainer: Trainer, phase_step: int) -> bool:
        """The network is neither finished nor parked; called before each step, after which the last one is resolved. Collective over its group."""
        self.resolve_pending(trainer)
        is_finished = trainer.stop_step is not None and phase_step >= trainer.stop_step
        return not is_finished and not self._records[trainer.name].is_parked

    def isolate(self, trainer: Trainer, error: Exception, phase_step: int) -> None:
        """Parks a network whose step raised, or has it start again in smaller micro-batches; other errors are raised again."""
        record = self._records[trainer.name]
        if is_lost_connection(error) or isinstance(error, torch.AcceleratorError):
            raise error
        if record.snapshot is None:  # a benchmark, which has nothing to go back to
            raise error
        lines = str(error).strip().splitlines() or ["no message"]
        reason = f"{type(error).__name__}: {lines[0]}"
        images = smaller_part(trainer.largest_part, trainer.least_part)
        if isinstance(error, torch.OutOfMemoryError) and images is not None:
            text = f"{trainer.name}: out of memory in micro-batches of {trainer.largest_part} images, {images} from the next start on"
            write_micro_batch(self._run_folder, trainer.name, images)
            note(self._run_folder, Event("out of memory", text, trainer.name, phase_step))
            raise StudentError(text) from error
        if dist.get_world_size(trainer.group) > 1:
            self._write_parked(trainer, phase_step, reason)
            raise StudentError(f"{trainer.name} is parked from now on: {reason}") from error
        trainer.restore_snapshot(record.snapshot)
        self._park(trainer, phase_step, reason)

    def watch(
        self, trainer: Trainer, batch: StudentBatch, attempt: Attempt, phase_step: int
    ) -> None:
        """Sends for the flag of a step, which ``is_training`` reads before the next one. No waiting."""
        record = self._records[trainer.name]
        record.applied.send(attempt.is_applied)
        record.pending = PendingStep(attempt, batch, phase_step)

    def resolve_pending(self, trainer: Trainer) -> None:
        """Takes in how the network's last step went, if that is not known yet. Waits for that step; collective over the group where it was skipped.

        Raises:
            RankError: a rank makes features that are not finite, again and again.
            UserError: the teacher makes them on every rank.
        """
        record = self._records[trainer.name]
        last, record.pending = record.pending, None
        if last is None:
            return
        if record.applied.read():
            record.in_a_row, record.has_moved = 0, True
            return
        cause, step = self._producers.find_cause(trainer, last), last.phase_step
        if self._producers.is_to_repeat(record.blamed, cause, step):
            self._train_again(trainer, last, cause)
            return
        record.num_skipped += 1
        record.in_a_row += 1
        self._report(trainer, "skipped", f"step {step} skipped, {cause.describe()}", step)
        if record.in_a_row == IN_A_ROW:
            self._roll_back(trainer, step, f"{IN_A_ROW} skipped steps in a row")

    def before_save(
        self, phase_step: int, *, takes_snapshot: bool = True
    ) -> dict[str, dict[str, Tensor]]:
        """Makes every network's state one that can be gone on from, and keeps it where a snapshot is taken. Collective over each network's group.

        Returns, where a snapshot is taken, the states of the networks that this rank trains alone, by name, in
        host memory that stays as it is until the next call: call it when no save is under way.
        """
        skipping = dict[str, dict[str, Tensor]]()
        for trainer in self._phase.trainers:
            self.resolve_pending(trainer)
            record = self._records[trainer.name]
            if record.is_parked:
                continue
            if trainer.is_alone and takes_snapshot:
                copied, is_finite = trainer.judged_snapshot(record.spare)
                if not is_finite:
                    record.spare = copied
                    self._roll_back(trainer, phase_step, "its state is not finite")
                elif record.in_a_row:
                    record.spare, skipping[trainer.name] = copied, copied.state
                else:
                    record.snapshot, record.spare = copied, record.snapshot
                    record.count_from(phase_step)
            elif not trainer.is_finite():
                self._roll_back(trainer, phase_step, "its state is not finite")
            elif takes_snapshot and not record.in_a_row:
                self._take_snapshot(trainer, phase_step)
        return {**self._held_states(), **skipping} if takes_snapshot else {}

    def _held_states(self) -> dict[str, dict[str, Tensor]]:
        """The states to go back to of the networks that this rank trains alone."""
        records = {t.name: self._records[t.name] for t in self._phase.trainers if t.is_alone}
        return {name: each.snapshot.state for name, each in records.items() if each.snapshot}

    def counts(self) -> list[float]:
        """Of every network of the phase: steps skipped, times rolled back, parked (1). Zero for those of other ranks.

        Waits for the last step; collective over each network's group.
        """
        for trainer in self._phase.trainers:
            self.resolve_pending(trainer)
        empty = _Record()
        records = [self._records.get(p.name, empty) for p in self._phase.plan.placements]
        each = ((r.num_skipped, r.num_rolled_back, r.is_parked) for r in records)
        return [float(value) for values in each for value in values]

    def _take_snapshot(self, trainer: Trainer, phase_step: int) -> None:
        record = self._records[trainer.name]
        record.snapshot = trainer.snapshot(record.snapshot)
        record.count_from(phase_step)

    def _roll_back(self, trainer: Trainer, phase_step: int, reason: str) -> None:
        record = self._records[trainer.name]
        assert record.snapshot is not None, "a phase starts by keeping its states"
        trainer.restore_snapshot(record.snapshot)
        record.in_a_row, record.has_moved = 0, False
        record.num_rolled_back += 1
        record.num_roll_backs += 1
        text = f"rolled back to step {record.snapshot_step}: {reason}"
        self._report(trainer, "rolled back", text, phase_step)
        if record.num_roll_backs == ROLL_BACKS:
            self._park(trainer, phase_step, f"rolled back {ROLL_BACKS} times to the same state")

    def _park(self, trainer: Trainer, phase_step: int, reason: str) -> None:
        record = self._records[trainer.name]
        record.is_parked = True
        if trainer.placement.first_rank == self._phase.world_rank:
            self._write_parked(trainer, phase_step, reason)
        text = f"parked with its state of step {record.snapshot_step}: {reason}"
        self._report(trainer, "parked", text, phase_step)

    def _write_parked(self, trainer: Trainer, phase_step: int, reason: str) -> None:
        write_parked(self._run_folder, trainer.name, Parked(phase_step, reason))

    def _train_again(self, trainer: Trainer, last: PendingStep, cause: Cause) -> None:
        """Repeats a skipped step on features that the ranks of the group compute themselves. Collective over it."""
        step, phase = last.phase_step, self._phase
        batch = self._producers.recompute(trainer, last, cause)
        if trainer.placement.first_rank == phase.world_rank:
            known = {event.text for event in read_events(self._run_folder)}  # by another network
            for text in self._producers.describe(cause, step):
                if text not in known:
                    note(self._run_folder, Event("recomputed", text, step=step))
        trainer.forget_step()
        try:
            attempt = trainer.train_step(batch, phase.schedule.at(phase.first_step + step))
        except Exception as error:
            self.isolate(trainer, error, step)
        else:
            self.watch(trainer, batch, attempt, step)
            self.resolve_pending(trainer)

    def _report(self, trainer: Trainer, kind: EventKind, text: str, phase_step: int) -> None:
        if trainer.placement.first_rank == self._phase.world_rank:
            note(self._run_folder, Event(kind, f"{trainer.name}: {text}", trainer.name, phase_step))
