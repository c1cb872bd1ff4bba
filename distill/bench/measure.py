"""Throughput, measured: this job, the published procedure, and one separate job per student, side by side in one run.

    ours       filled shares, slices, look-ahead (the engine settings of the recipe)
    published  even shares, everything gathered by everybody, all ranks meet every step
    separate   one student after the other on all ranks, each with the teacher to itself
    saving     ours, with one checkpoint in every block of steps: what a checkpoint costs

Every rank runs the real loop with the real exchange. The modes take turns, a block of steps each, so
that a disturbance of the machine meets all of them; figures are medians over blocks. With ``sleep``
the networks are replaced by sleeps in the proportion of the plan's costs: then a few cores can stand
for many devices, and what is measured is the orchestration alone.
"""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.bench.modes import OURS, SAVING, modes_of, plan_mode
from distill.bench.report import build_report
from distill.bench.stand_ins import (
    Jitter,
    SleepingStudent,
    SleepingTeacher,
    Span,
    SyntheticLoader,
    TimedSaver,
    Trace,
    Turn,
    Unsaved,
    Witness,
)
from distill.bench.turns import BLOCK, block_steps, simulated_step_s, traced_steps
from distill.data.index import ImageIndex, make_index
from distill.data.locations import Location
from distill.data.sources import Found
from distill.engine.device import take_device
from distill.engine.engine import prepare_deepspeed
from distill.engine.forkserver import choose_start_method
from distill.engine.join import join_ranks
from distill.engine.local_ranks import LocalRanks
from distill.errors import PlanError, UserError
from distill.job.build import (
    PhaseContext,
    PhaseSpec,
    RankContext,
    build_phase,
    compute_dtype,
    freeze,
)
from distill.job.family import Family
from distill.plan.from_recipe import TeacherShape, on_nodes_of
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FAMILY_PHASE, FamilyRecipe
from distill.recipe.reader import load_job
from distill.runfolder.heartbeat import Heartbeat
from distill.screen.console import printable
from distill.train.balance import BalanceListener, Balancer
from distill.train.exchange import AllGather, Slices
from distill.train.faults import FaultHandler
from distill.train.groups import Groups, make_groups
from distill.train.loop import run_phase
from distill.train.phase import Phase
from students.student import build_backbone, build_heads, seeded
from teacher.frozen import FrozenTeacher
from teacher.losses import Objective

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Request:
    """What to measure. ``slow_rank`` (with ``sleep_s``) works ``slow_factor`` times as long.

    ``costs``: a file with the seconds per image that plans assume, and sleeps take.
    ``jitter`` (with ``sleep_s``): of the work of a rank and step, relative.
    ``index``: a folder with the index of the recipe's images; synthetic ones where it is None.
    ``folder``: where logs and the saves of the mode ``saving`` go; ``measure`` makes one.
    """

    recipe: str
    overrides: tuple[str, ...]
    against: tuple[str, ...]
    num_ranks: int
    num_steps: int
    warmup_steps: int
    sleep_s: float | None
    slow_rank: int | None
    slow_factor: float
    costs: str | None = None
    index: str | None = None
    folder: str = ""
    jitter: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Turns of each mode."""
        return -(-self.num_steps // BLOCK)


def measure(request: Request) -> dict[str, Any]:
    """Runs the ranks and puts their figures together.

    Raises:
        UserError: the recipe or the plan cannot work.
    """
    family, shape = family_of(request)
    num_ranks, costs = request.num_ranks, request.costs
    modes = modes_of(family, request.against, num_ranks)
    plans = {  # what cannot work is reported here
        name: plan_mode(name, recipe, shape, num_ranks, costs) for name, recipe in modes.items()
    }
    if plans[OURS].is_teacher_sharded and request.sleep_s is None:
        raise PlanError(
            "bench compares teachers that are replicated on every rank; this one would be sharded",
            fix="Write engine.teacher_sharding=replicated, or use --sleep.",
        )
    runs = Path("runs")  # where a job would save: a temporary folder may be memory
    if SAVING in request.against:
        runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".bench-", dir=runs if SAVING in request.against else None
    ) as folder:
        request = replace(request, folder=folder)
        engine_device = "cpu" if request.sleep_s is not None else family.engine.device
        results = run_ranks(request, choose_start_method(engine_device))
    slow = None if request.slow_rank is None else (request.slow_rank, request.slow_factor)
    ranks = [results[rank] for rank in range(num_ranks)]
    flops_s = sum(plan_mode(OURS, family, shape, num_ranks, None).load_s)
    turns = [each for each, _ in ranks]
    report = build_report(family, plans, turns, request.sleep_s, slow, flops_s)
    for name, figures in report["modes"].items():
        if request.sleep_s is not None:
            scale = request.sleep_s / plans[OURS].step_s
            steps = request.warmup_steps, request.num_blocks
            found_s = simulated_step_s(plans[name], modes[name], steps, request.jitter, slow)
            figures["simulated_step_s"] = scale * found_s
        figures["timeline"] = [
            [[round(start, 6), round(stop, 6), *what] for start, stop, *what in traces[name]]
            for _, traces in ranks
        ]
    return report


def run_ranks(request: Request, start_method: str) -> dict[int, tuple["Turns", "Traces"]]:
    """Starts the ranks and returns what each measured.

    Raises:
        UserError: a rank failed; it has printed why.
    """
    with LocalRanks(start_method, request.num_ranks) as ranks:
        ranks.start(measure_rank, asdict(request))
        while ranks.are_running:
            ranks.wait(1.0)
            failed = {rank: code for rank, code in ranks.exit_codes.items() if code != 0}
            if failed:
                rank, code = next(iter(failed.items()))
                raise UserError(
                    f"bench: rank {rank} ended with exit code {code}",
                    fix="The lines above have the cause.",
                )
        ranks.wait(0.0)
        return ranks.results


def family_of(request: Request) -> tuple[FamilyRecipe, TeacherShape]:
    """The recipe, long enough for what is measured, and its teacher."""
    loaded, teacher = load_job(request.recipe, request.overrides)
    recipe = on_nodes_of(loaded, request.num_ranks)
    assert isinstance(recipe, FamilyRecipe), "checked by the command"
    turns = request.num_blocks * (2 if SAVING in request.against else 1)
    lookahead = recipe.engine.lookahead
    least = 2 * request.warmup_steps + turns * block_steps(lookahead) + traced_steps(lookahead)
    steps = {"steps": max(recipe.schedule.steps, least)}
    recipe = recipe.at_stage(recipe.parts[0])  # the others have the same networks
    settings = recipe.schedule.model_copy(update=steps)
    recipe = recipe.model_copy(update={"schedule": settings, "stages": None})
    return recipe, teacher_shape(recipe, teacher, has_files=False)


Turns = dict[str, list[Turn]]
Traces = dict[str, list[Span]]


def measure_rank(fields: dict[str, Any], store: str) -> tuple[Turns, Traces]:
    """What one rank measured, by mode (``saving`` beside the others where it is requested), and one step of each."""
    request = Request(**fields)
    family, shape = family_of(request)
    wanted = "cpu" if request.sleep_s is not None else family.engine.device
    device = take_device(wanted, is_deterministic=family.engine.deterministic)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // request.num_ranks))
    join_ranks(device.type, TIMEOUT, store)
    try:
        prepare_deepspeed(device.type)
        bench = Bench(request, family, shape, device)
        return bench.run(), bench.trace()
    finally:
        dist.destroy_process_group()


class Bench:
    """All modes on one rank."""

    def __init__(
        self, request: Request, family: FamilyRecipe, shape: TeacherShape, device: torch.device
    ) -> None:
        self.request, self.shape, self.device = request, shape, device
        self.rank = dist.get_rank()
        self.heartbeat = Heartbeat(Path(), self.rank)  # no watchdog reads it
        self.modes = modes_of(family, request.against, request.num_ranks)
        self.teacher = None if request.sleep_s is not None else self._teacher(family)
        plan = plan_mode(OURS, family, shape, request.num_ranks, request.costs)
        self.scale = None if request.sleep_s is None else request.sleep_s / plan.step_s
        self.phases = {name: self._phase(name, recipe) for name, recipe in self.modes.items()}
        self.steps_done = dict.fromkeys(self.phases, 0)
        self.fault_handlers = {
            name: FaultHandler(phase, Path()) for name, phase in self.phases.items()
        }

    def _teacher(self, family: FamilyRecipe) -> FrozenTeacher:
        generator, dtype = seeded(family.seed, "teacher"), compute_dtype(family)
        backbone = build_backbone(self.shape.spec, generator, self.device, dtype)
        shapes = self.shape.heads
        heads = None if shapes is None else build_heads(shapes, generator, self.device, dtype)
        return freeze(family, self.device, backbone, heads)

    def _phase(self, mode: str, recipe: FamilyRecipe) -> Phase:
        request = self.request
        plan = plan_mode(mode, recipe, self.shape, request.num_ranks, request.costs)
        groups = make_groups(plan, TIMEOUT)
        folder = request.index
        index = _no_images() if folder is None else ImageIndex.load(Path(folder))
        rank_context = RankContext(self.device, Path(folder or ""), index)
        labels = frozenset(student.label for student in recipe.students)  # no weights are read
        context = PhaseContext(
            recipe, plan, groups, rank_context, self.shape.spec, self._report, labels
        )
        if self.scale is None:
            assert self.teacher is not None, "only sleeps need no teacher"
            starts = dict.fromkeys((student.label for student in recipe.students), 0)
            phase = Family(context, self.teacher, self.shape, starts).phase(recipe.parts[0])
        else:
            phase = self._sleeping_phase(context, recipe, groups)
        if folder is None:
            is_tiny = self.scale is not None
            loader = SyntheticLoader(recipe, phase, self.rank, self.device, is_tiny=is_tiny)
            phase = replace(phase, loader=loader)
        if self.scale is None or not recipe.engine.balance or not plan.is_dithered:
            return phase
        balancer = Balancer(
            phase.plan_schedule,
            groups.control,
            phase.loader,
            (phase.teaching, {trainer.name: trainer.training for trainer in phase.trainers}),
            lookahead=phase.lookahead,
            every=recipe.engine.balance,
            listener=BalanceListener(self._report, lambda _: None),
        )
        return replace(phase, after_step=balancer.after_step)

    def _report(self, event: str) -> None:
        if self.rank == 0:
            sys.stderr.write(printable(event) + "\n")

    def _sleeping_phase(self, context: PhaseContext, recipe: FamilyRecipe, groups: Groups) -> Phase:
        assert self.scale is not None, "sleeps have a scale"
        plan = context.plan
        factor = self.request.slow_factor if self.rank == self.request.slow_rank else 1.0
        pace = self.scale * factor
        jitter = Jitter(self.request.jitter, self.rank)
        spec = PhaseSpec(
            FAMILY_PHASE,
            range(recipe.schedule.steps),
            Objective(1.0, 1.0, 0.0, 1.0),
            rates={},
            lookahead=recipe.engine.lookahead,
            exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
        )
        trainers = tuple(
            SleepingStudent(
                placement, groups.by_network[placement.name], image_s * pace, self.rank, jitter
            )
            for placement, image_s in zip(plan.placements, plan.image_s, strict=True)
            if self.rank in placement.world_ranks
        )
        return build_phase(context, spec, SleepingTeacher(plan.teach_s * pace, jitter), trainers)

    def run(self) -> Turns:
        """Blocks of steps, the modes in turn."""
        request = self.request
        names = list(self.phases)
        if SAVING in request.against:
            names.insert(1, SAVING)  # right after ours, which it is compared with
        turns: Turns = {name: [] for name in names}
        for name in names:
            self.warm_up(name)
        self._report(f"warmed up: {request.warmup_steps} steps of each")
        for block in range(request.num_blocks):
            for name in names:
                turns[name].append(self.turn(name))
            self._report(f"block {block + 1} of {request.num_blocks}")
        return turns

    def trace(self) -> Traces:
        """One step of each mode, from when rank 0 ends a step to when it ends the next. Collective over the world."""
        traces = {}
        for name, phase in self.phases.items():
            start, first = self.steps_done[name], phase.lookahead
            length = traced_steps(first)
            trace, witness = Trace(self.device), Witness()
            dist.barrier()
            self._run_phase(name, start, length, witness, Unsaved(), trace)
            window = torch.tensor(
                witness.ends_s[first : first + 2],
                dtype=torch.float64,
                device=self.device,
            )
            dist.broadcast(window, src=0)
            began, ended = window.tolist()
            traces[name] = trace.spans((began, ended))
        return traces

    def _run_phase(
        self,
        mode: str,
        start: int,
        length: int,
        witness: Witness,
        saver: TimedSaver | Unsaved,
        heartbeat: Heartbeat | Trace,
    ) -> None:
        run_phase(
            replace(self.phases[mode], num_steps=start + length),
            witness,
            saver,
            self.fault_handlers[mode],
            heartbeat,
            start,
        )
        self.steps_done[mode] += length

    def warm_up(self, name: str) -> None:
        """Steps of a mode that are not measured. Collective over the world."""
        mode, is_saving = self._mode_of(name)
        witness = Witness(save_after=1 if is_saving else None)
        saver = self._saver(is_saving=is_saving)
        start, length = self.steps_done[mode], self.request.warmup_steps
        self._run_phase(mode, start, length, witness, saver, self.heartbeat)
        saver.wait()

    def turn(self, name: str) -> Turn:
        """A block of steps of a mode. Collective over the world."""
        mode, is_saving = self._mode_of(name)
        start, first = self.steps_done[mode], self.phases[mode].lookahead + 1
        witness = Witness((first, first + BLOCK), first if is_saving else None)
        saver = self._saver(is_saving=is_saving)
        dist.barrier()
        began = time.monotonic()
        self._run_phase(mode, start, block_steps(first - 1), witness, saver, self.heartbeat)
        saver.wait()
        wall_s = time.monotonic() - began
        stall_s = 0.0
        if isinstance(saver, TimedSaver):
            stall_s = saver.returned_s - witness.ends_s[first - 1]
        before, after = witness.marks
        return Turn(before, after, BLOCK, wall_s, stall_s)

    def _mode_of(self, name: str) -> tuple[str, bool]:
        """The mode whose networks are used, and whether a save is made."""
        return (OURS, True) if name == SAVING else (name, False)

    def _saver(self, *, is_saving: bool) -> TimedSaver | Unsaved:
        return TimedSaver(Path(self.request.folder)) if is_saving else Unsaved()


def _no_images() -> ImageIndex:
    """An index for a context whose loader is replaced: one file that is never opened."""
    return make_index([Found(Location.of(Path("none")), "")], [(1, 1)], (("none", 1),))
