"""NaN and Inf in one student's loss, gradient, parameter, received rows; and in what the teacher said.

Claims, for every fault: no bad step is applied (a skipped step leaves weights, moments and EMA as
they were, and the end is finite); the other students end with the bits of a run without faults; the
diary names the student.

A bad teacher row, at its source or on its way, is no student's fault: it is computed once more, every student ends
with the bits of a run without faults, none has skipped a step, and the diary names the rank that made it.
The ranks run the real loop on gloo; faults are put in by wrapping objects of the phase.
"""

import argparse
import gc
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import prepare_deepspeed
from distill.plan.placement import NetworkCost
from distill.plan.plan import Plan, PlanOptions, make_plan
from distill.runfolder.events import read_events
from distill.runfolder.heartbeat import Heartbeat
from distill.train.exchange import Outgoing, Pending
from distill.train.faults import IN_A_ROW, FaultHandler
from distill.train.groups import Groups, make_groups
from distill.train.loop import run_phase
from distill.train.phase import Decision, Phase
from distill.train.student import Attempt, StudentTrainer
from teacher.batch import StudentBatch
from teacher.losses import Losses
from tests.support.families import IMAGES, NoSaver, Ways, family_phase
from tests.support.spawn import on_ranks

STUDENTS = ("a", "b", "c")
KINDS = ("loss", "gradient", "parameter", "weight shard", "received rows", "teacher rows")
IN_WEIGHTS = frozenset({"parameter", "weight shard"})
OF_PRODUCERS = frozenset({"received rows", "teacher rows"})
LASTING = frozenset({"weight shard"})  # stays bad until the student is rolled back
NUM_STEPS = 10
LOOKAHEAD = 2
SAVE_AT = 4  # a save between the start and most faults


Bits = tuple[list[dict[str, Tensor]], dict[str, Tensor]]  # of a student, and of its targets


@dataclass(frozen=True)
class Fault:
    """One value in one place: of ``student`` on the ``turn``-th rank of its group, at ``step``; ``until``: again and again."""

    kind: str
    student: str
    turn: int
    step: int
    value: float
    has_heads: bool = True
    until: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a training ended on one rank, per student that it trains."""

    states: dict[str, dict[str, Tensor]]
    skipped: dict[str, int]
    rolled_back: dict[str, int]
    parked: dict[str, bool]
    changed_by_skipped: tuple[str, ...]
    told: tuple[str, ...]


def run(arguments: list[str]) -> bool:
    """True when a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos nan", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="faults, one training each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    faults = [_draw(KINDS[number % len(KINDS)], draw) for number in range(options.count)]
    with tempfile.TemporaryDirectory() as folder:
        limit_s = 120 + 30 * options.count
        per_rank = on_ranks(options.ranks, train_all, faults, folder, timeout_s=limit_s)
    calm = {has: [each[index] for each in per_rank] for index, has in enumerate((True, False))}
    wrong = []
    for number, fault in enumerate(faults):
        outcomes = [outcomes[2 + number] for outcomes in per_rank]
        problems = check(fault, calm[fault.has_heads], outcomes)
        wrong += [f"{fault}: {problem}" for problem in problems]
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(f.kind for f in faults).items())
    sys.stdout.write(f"faults: {len(faults)} ({kinds})\nwrong: {len(wrong)}\n")
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    return bool(wrong)


def _draw(kind: str, draw: random.Random) -> Fault:
    value = draw.choice([float("nan"), float("inf"), -float("inf")])
    step = draw.randrange(1, NUM_STEPS - IN_A_ROW - 1)
    has_heads = draw.random() < 0.75
    return Fault(kind, draw.choice(STUDENTS), draw.randrange(8), step, value, has_heads)


def check(fault: Fault, calm: list[Outcome], outcomes: list[Outcome]) -> list[str]:
    """The claims that do not hold."""
    problems = []
    is_producers = fault.kind in OF_PRODUCERS
    for rank, (before, now) in enumerate(zip(calm, outcomes, strict=True)):
        problems += [f"rank {rank}: a skipped step changed {n}" for n in now.changed_by_skipped]
        for name, state in now.states.items():
            bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
            problems += [f"rank {rank}: {name}/{key} is not finite" for key in bad]
            is_hit = name == fault.student and not is_producers
            expected = skips_of(fault) if is_hit else 0
            if now.skipped[name] != expected:
                problems.append(f"{name} skipped {now.skipped[name]} steps instead of {expected}")
            if now.rolled_back[name] != int(is_hit and fault.kind in LASTING):
                problems.append(f"{name} was rolled back {now.rolled_back[name]} times")
            if not is_hit and not _same(before.states[name], state):
                problems.append(f"rank {rank}: {name} differs from the run without a fault")
    wanted = f"{fault.student}: step {fault.step} skipped, "
    if is_producers:
        wanted = f": its teacher features of family step {fault.step} were not finite"
    if fault.kind == "teacher rows":
        wanted = f"rank {source_of(fault, len(outcomes))}{wanted}"
    if not any(wanted in text for text in outcomes[0].told):
        problems.append(f"not named in {outcomes[0].told}")
    return problems


def skips_of(fault: Fault) -> int:
    """Steps that a student hit by the fault skips: a lasting one ends with a roll-back, at the latest at a save."""
    if fault.kind not in LASTING:
        return 1
    return min(IN_A_ROW, SAVE_AT - fault.step) if fault.step < SAVE_AT else IN_A_ROW


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# On the ranks ------------------------------------------------------------------------------------


def train_all(faults: list[Fault], folder: str) -> list[Outcome]:
    """One training after another in the same processes; the first two without a fault, with heads and without."""
    prepare_deepspeed("cpu")
    works = [NetworkCost(name, cost) for name, cost in zip(STUDENTS, (3.0, 2.0, 1.0), strict=True)]
    plan = make_plan(works, 1.0, IMAGES, dist.get_world_size(), PlanOptions(lookahead=LOOKAHEAD))
    groups = make_groups(plan, timedelta(seconds=60))
    trainings = [(None, True), (None, False), *((fault, fault.has_heads) for fault in faults)]
    outcomes = []
    for number, (fault, has_heads) in enumerate(trainings):
        run_folder = Path(folder) / str(number)
        outcomes.append(train(plan, groups, fault, has_heads=has_heads, run_folder=run_folder))
        gc.collect()
    return outcomes


def train(
    plan: Plan, groups: Groups, fault: Fault | None, *, has_heads: bool, run_folder: Path
) -> Outcome:
    """The real loop over a tiny family, with one fault put in."""
    run_folder.mkdir(exist_ok=True)
    phase = family_phase(plan, groups, NUM_STEPS, Ways(has_heads=has_heads, lookahead=LOOKAHEAD))
    fault_handler = FaultHandler(phase, run_folder)
    witness = _Witness(fault_handler, fault, phase)
    fault_handler.start(0, groups.control)
    heartbeat = Heartbeat(run_folder, phase.world_rank)
    run_phase(phase, _Recorder(), NoSaver(), witness, heartbeat, 0)
    fault_handler.before_save(NUM_STEPS)
    dist.barrier()  # every rank has written its events
    counts, names = fault_handler.counts(), [placement.name for placement in plan.placements]
    own = {trainer.name: 3 * names.index(trainer.name) for trainer in phase.trainers}
    return Outcome(
        {trainer.name: trainer.state() for trainer in phase.trainers},
        {name: int(counts[place]) for name, place in own.items()},
        {name: int(counts[place + 1]) for name, place in own.items()},
        {name: bool(counts[place + 2]) for name, place in own.items()},
        tuple(witness.changed),
        tuple(event.text for event in read_events(run_folder)),
    )


class _Witness:
    """Stands between the loop and the fault handler: puts the fault in, and looks whether a skipped step changed anything."""

    def __init__(self, fault_handler: FaultHandler, fault: Fault | None, phase: Phase) -> None:
        self._fault_handler, self._fault, self._rank = fault_handler, fault, phase.world_rank
        self.before_save, self.counts = fault_handler.before_save, fault_handler.counts
        self.changed: list[str] = []
        self._spoiled = ExitStack()  # of the step at hand
        self._before: Bits = ([], {})
        if fault is not None and fault.kind == "teacher rows":
            spoil_teacher_(fault, phase)

    def is_training(self, trainer: StudentTrainer, phase_step: int) -> bool:
        is_training = self._fault_handler.is_training(trainer, phase_step)
        fault = self._fault
        is_now = is_training and fault is not None and self._is_here(fault, trainer, phase_step)
        if fault is not None and is_now and fault.kind in IN_WEIGHTS:
            spoil_weights_(fault, trainer)
        self._before = (trainer.engine.snapshot(), trainer.targets.state())
        if fault is not None and is_now and fault.kind not in IN_WEIGHTS:
            self._spoiled.enter_context(spoiling(fault, trainer))
        return is_training

    def isolate(self, trainer: StudentTrainer, error: Exception, phase_step: int) -> None:
        self._spoiled.close()
        self._fault_handler.isolate(trainer, error, phase_step)

    def watch(
        self, trainer: StudentTrainer, batch: StudentBatch, attempt: Attempt, phase_step: int
    ) -> None:
        self._spoiled.close()
        fault = self._fault
        if fault is not None and self._is_here(fault, trainer, phase_step):
            batch = spoiled_batch(fault, batch)
        self._fault_handler.watch(trainer, batch, attempt, phase_step)
        if not bool(attempt.is_applied):
            (before, targets), after = self._before, trainer.engine.snapshot()
            pairs = [(one[k], two[k]) for one, two in zip(before, after, strict=True) for k in one]
            pairs += [(targets[key], tensor) for key, tensor in trainer.targets.state().items()]
            if not all(is_same_bits(one, two) for one, two in pairs):
                self.changed.append(f"{trainer.name} at step {phase_step}")

    def _is_here(self, fault: Fault, trainer: StudentTrainer, step: int) -> bool:
        ranks = trainer.placement.world_ranks
        is_here = trainer.name == fault.student and ranks[fault.turn % len(ranks)] == self._rank
        return is_here and fault.step <= step <= max(fault.step, fault.until)


def is_same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where both are the same NaN."""
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


@torch.no_grad()
def spoil_weights_(fault: Fault, trainer: StudentTrainer) -> None:
    """One number of the network it computes with, which the skipped step makes good, or of the weights that the optimizer holds."""
    tensor = trainer.engine._shards.weights[0]
    if fault.kind == "parameter":
        tensor = next(p for p in trainer.engine.module.parameters() if p.requires_grad)
    tensor.view(-1)[0] = fault.value


def spoil_teacher_(fault: Fault, phase: Phase) -> None:
    """One row that a rank's teacher makes at the step."""
    if phase.world_rank != source_of(fault, phase.plan.num_ranks):
        return
    exchange, start = phase.exchange, phase.exchange.start

    def spoiled(outgoing: Outgoing) -> Pending:
        if outgoing.step == fault.step:
            rows = outgoing.targets.class_features.clone()
            rows[fault.turn % len(rows), 0, 0] = fault.value
            outgoing = replace(outgoing, targets=replace(outgoing.targets, class_features=rows))
        return start(outgoing)

    exchange.start = spoiled  # type: ignore[method-assign]


def source_of(fault: Fault, num_ranks: int) -> int:
    """The rank whose teacher is wrong."""
    return fault.turn % num_ranks


def spoiled_batch(fault: Fault, batch: StudentBatch) -> StudentBatch:
    """What the student received, with the value in one of the rows if that is where the fault is."""
    if fault.kind != "received rows":
        return batch
    rows = batch.targets.class_features.clone()
    rows[fault.turn % len(rows), 0, 0] = fault.value
    return replace(batch, targets=replace(batch.targets, class_features=rows))


@contextmanager
def spoiling(fault: Fault, trainer: StudentTrainer) -> Iterator[None]:
    """While inside, the student's loss, gradient or received rows hold the value."""
    if fault.kind == "gradient":
        parameter = next(p for p in trainer.engine.module.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda gradient: gradient * fault.value)
        yield
        handle.remove()
        return
    train_step, forward = trainer.train_step, trainer.engine.forward

    def spoiled_step(batch: StudentBatch, *rest: Any) -> Attempt:
        return train_step(spoiled_batch(fault, batch), *rest)

    def spoiled_forward(*inputs: Any) -> Losses:
        losses: Losses = forward(*inputs)
        if fault.kind == "exception":
            raise ValueError("a network of another shape")
        return replace(losses, total=losses.total + fault.value)

    trainer.train_step = spoiled_step  # type: ignore[method-assign]
    if fault.kind != "received rows":
        trainer.engine.forward = spoiled_forward  # type: ignore[method-assign]
    yield
    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.engine.forward = forward  # type: ignore[method-assign]


class _Recorder:
    """Asks for one save."""

    def record(self, _: Phase, step: int, __: object) -> Decision:
        return Decision(save=step == SAVE_AT, stop=False)
