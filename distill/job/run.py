"""What one rank does from start to end: join the others, run the phases, write the results.

    teacher recipe: its stages, then the teacher folder
    family recipe:  the teacher's stages where it is to be trained, its heads where they are to be
    fitted, then the family phase, then the students' folders

The run folder is prepared before (``distill.job.prepare``): indices and the resolved recipe are there.
A checkpoint names the phase and the step to resume at; phases before it are not repeated.
"""

import gc
import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from distill.data.index import ImageIndex
from distill.engine.device import cores_of_rank, take_device
from distill.engine.engine import prepare_deepspeed
from distill.engine.held_copies import Target, open_memory, remove_where_saved
from distill.engine.join import MeetingPlace, join_ranks
from distill.engine.micro_batches import agreed_micro_batches
from distill.engine.peer_copies import PeerCopies
from distill.export.save import fingerprint, write_heads
from distill.job.agreement import require_agreement
from distill.job.build import PhaseContext, RankContext
from distill.job.family import Family, load_teacher, shard_teacher
from distill.job.prepare import CHECKPOINTS, FITTED_HEADS, Job
from distill.job.pretraining import HeadFitting, Pretraining
from distill.job.resume import agreed_checkpoint, joining_steps
from distill.job.write_networks import write_students, write_teacher
from distill.listing.document import RESOLVED
from distill.listing.extensions import BUILTIN, ExtensionKind, find
from distill.listing.storage import Storage
from distill.plan.flops import DEFAULT_DEVICE, Device
from distill.plan.from_recipe import ONLINE, TeacherShape, plan_family, plan_fitting
from distill.plan.here import timed_as
from distill.plan.pretraining import plan_stage
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import HEADS_PHASE, EngineSpec, FamilyRecipe, TeacherRecipe, is_ours
from distill.runfolder.events import Event, note
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.manifest import NetworkFacts
from distill.runfolder.metrics import MetricSinks, SinkFactory
from distill.runfolder.requests import StopSaveRequests
from distill.runfolder.saver import CheckpointPolicy, Saver, restore, saved_anchor
from distill.runfolder.status import PhaseStatus, note_time, write_json
from distill.train.faults import FaultHandler
from distill.train.groups import make_control, make_groups
from distill.train.loop import run_phase
from distill.train.phase import Phase
from distill.train.placing import agreed_costs, place_family
from distill.train.recorder import Recorder, RecordPolicy
from distill.weights.containers import read_again

# longer than any save or first step here; a dead peer fails at once
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def work(
    job: Job,
    requests: StopSaveRequests,
    heartbeat: Heartbeat,
    store: MeetingPlace,
    report_save: Callable[[str], None] = lambda _: None,
) -> bool:
    """Runs one rank of a prepared job; the launcher has set the usual rank variables, ``store`` is as in ``join_ranks``.

    ``report_save`` gets the result of every save on rank 0, empty for a good one. Returns False where the job was stopped before its end.

    After an error the process group still stands: the caller writes down the cause, then leaves it.
    """
    engine = job.recipe.engine
    device = take_device(engine.device, is_deterministic=engine.deterministic)
    if device.type == "cpu":
        torch.set_num_threads(cores_of_rank())
    else:
        heartbeat.set_memory(partial(torch.cuda.max_memory_reserved, device))
    join_ranks(device.type, COLLECTIVE_TIMEOUT, store)
    prepare_deepspeed(device.type)
    run = _Run(job, device, requests, heartbeat)
    run.recorder.report_saves_to(report_save)
    is_done = run.run()
    dist.destroy_process_group()
    return is_done


class _Run:
    """The phases of one job on one rank."""

    def __init__(
        self, job: Job, device: torch.device, requests: StopSaveRequests, heartbeat: Heartbeat
    ) -> None:
        self.job, self.device, self.heartbeat = job, device, heartbeat
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.storage = Storage(self._note_storage, heartbeat.wait_for_storage)
        recipe, teacher_recipe = job.recipe, job.teacher_recipe
        self.teacher_recipe = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
        self.family = recipe if isinstance(recipe, FamilyRecipe) else None
        self.control, notes = make_control(COLLECTIVE_TIMEOUT), list[str]()
        require_agreement(job, self.control)
        folder = job.run_folder / CHECKPOINTS
        nodes = None
        if recipe.checkpoint.peer:
            nodes = open_memory(job.run_folder, self._target(), self.control, notes.append)
        self.saved = agreed_checkpoint(folder, job.hash, self.control, notes.append)
        names = (ONLINE, HEADS_PHASE, *job.networks)
        self.micro_batches = agreed_micro_batches(job.run_folder, names, self.control)
        self.first_steps = joining_steps(recipe, job.networks, self.saved)
        every = recipe.checkpoint
        policy = RecordPolicy(
            recipe.engine.log_every,
            every.every_s,
            [steps for steps in (every.every_steps, every.milestones) if steps is not None],
        )
        self.recorder = Recorder(
            job.run_folder,
            self._phases(),
            requests,
            policy,
            job.resume_command,
            self.control,
            partial(MetricSinks, factories=find_sinks(recipe.engine)),
        )
        self.recorder.show("preparing", message="; ".join(notes))
        last_saved = None if self.saved is None else (self.saved[1].phase, self.saved[1].step)
        checkpoint_policy = self._checkpoint_policy()
        self.saver = Saver(checkpoint_policy, self.recorder, last_saved)
        self.copies = None
        if nodes is not None:
            group = make_control(COLLECTIVE_TIMEOUT)
            self.copies = PeerCopies(checkpoint_policy, nodes, group, recipe.checkpoint.peer_every)

    def _target(self) -> Target:
        """Where a copy in memory becomes a checkpoint."""
        job = self.job
        return Target(
            job.run_folder / CHECKPOINTS,
            job.hash,
            job.teacher,
            (job.run_folder / RESOLVED).read_text(encoding="utf-8"),
            job.recipe.checkpoint.keep,
            [phase.name for phase in self._phases()],
        )

    def _checkpoint_policy(self) -> CheckpointPolicy:
        job = self.job
        networks = {
            name: NetworkFacts(hash=network_hash, first_step=self.first_steps[name])
            for name, network_hash in job.networks.items()
        }
        return CheckpointPolicy(
            job.run_folder / CHECKPOINTS,
            job.hash,
            networks,
            (job.run_folder / RESOLVED).read_text(encoding="utf-8"),
            job.recipe.checkpoint.keep,
            job.recipe.checkpoint.milestones,
            job.teacher,
        )

    def _phases(self) -> list[PhaseStatus]:
        """All phases with their share of the work in seconds."""
        phases = []
        if self.teacher_recipe is not None:
            for stage in self.teacher_recipe.stages:
                work = sum(plan_stage(self.teacher_recipe, stage, self.num_ranks).load_s)
                phases.append(PhaseStatus(stage.name, stage.steps, stage.steps * work, (ONLINE,)))
        if self.family is not None:
            shape = self._shape_of_teacher(self.family)
            if self.family.teacher.heads_mode == "fit":
                work = sum(plan_fitting(self.family, shape, self.num_ranks).load_s)
                steps = self.family.teacher.fit.steps
                phases.append(PhaseStatus(HEADS_PHASE, steps, steps * work, (HEADS_PHASE,)))
            names = tuple(student.label for student in self.family.students)
            for part in self.family.parts:
                plan = plan_family(self.family, shape, self.num_ranks, stage=part)
                name, steps = self.family.phase_of(part), part.steps
                phases.append(PhaseStatus(name, steps, steps * sum(plan.load_s), names))
        return phases

    def _shape_of_teacher(self, recipe: FamilyRecipe) -> TeacherShape:
        """The teacher's shape, read again while storage refuses its files."""
        weights = Path(str(recipe.teacher.weights))
        return read_again(self.storage, weights, lambda: teacher_shape(recipe, self.teacher_recipe))

    def run(self) -> bool:
        """Every phase that is not finished yet, then the results; returns early, and False, after a stop that was saved."""
        order = [phase.name for phase in self.recorder.status.phases]
        left = order[order.index(self.saved[1].phase) if self.saved else 0 :]
        is_trained = self.teacher_recipe is None or is_ours(left[0])
        if not is_trained and not self._pretrain(left):
            return self._stopped()
        if HEADS_PHASE in left and not self._fit_heads():
            return self._stopped()
        if self.job.request.until == HEADS_PHASE:
            text = f"heads are in {self.job.run_folder / FITTED_HEADS}"
            self.recorder.show("stopped", message=text)
            return True
        if self.family is not None and not self._train_family(left):
            return self._stopped()
        self._remove_copies(is_saved=True)
        self.recorder.show("exporting")
        return True

    def _remove_copies(self, *, is_saved: bool) -> None:
        """Frees the memory of the nodes, also of what a start with ``checkpoint.peer`` left. Collective over the world."""
        if self.copies is not None:
            self.copies.remove(is_saved=is_saved)
        else:
            remove_where_saved(self.job.run_folder, self.control, is_saved=is_saved)

    def _stopped(self) -> bool:
        self._remove_copies(is_saved=self.saver.is_saved)
        text = "saved" if self.saver.is_saved else self.recorder.status.message
        self.recorder.show("stopped", message=f"{text}; run the same command to go on")
        return False

    def _pretrain(self, names: list[str]) -> bool:
        recipe = self.teacher_recipe
        assert recipe is not None, "pretraining without a teacher recipe"
        plan = plan_stage(recipe, recipe.stages[0], self.num_ranks)
        groups = make_groups(plan, COLLECTIVE_TIMEOUT)
        pretraining = Pretraining(
            recipe, groups, self._rank_context("teacher"), is_restored=self.saved is not None
        )
        for stage in recipe.stages:
            if stage.name not in names:
                continue
            resumed = self.saved if self.saved and self.saved[1].phase == stage.name else None
            anchor = saved_anchor(resumed[0]) if resumed and stage.gram else None
            phase = pretraining.phase(stage, anchor)
            start_step = self._restore(phase)
            pretraining.engine.copy_ema_to(pretraining.ema)
            if not self._run_phase(phase, start_step):
                return False
        weights = pretraining.engine.full("ema", collect=self.rank == 0)
        if self.rank == 0:
            steps = pretraining.engine.steps_applied()
            write_teacher(self.job, recipe, weights, pretraining.shape.spec, steps)
        dist.barrier()
        return True

    def _fit_heads(self) -> bool:
        recipe = self.family
        assert recipe is not None, "heads are fitted for a family"
        shape = self._shape_of_teacher(recipe)
        plan = plan_fitting(recipe, shape, self.num_ranks)
        groups = make_groups(plan, COLLECTIVE_TIMEOUT)
        teacher = load_teacher(recipe, self.job.teacher_paths[0], None, self.device, self.storage)
        fitting = HeadFitting(
            recipe, teacher.backbone, shape, plan, groups, self._rank_context("train")
        )
        phase = fitting.phase()
        start_step = self._restore(phase)
        fitting.engine.copy_ema_to(fitting.ema)
        if not self._run_phase(phase, start_step):
            return False
        weights = fitting.heads()
        if self.rank == 0:
            write_heads(self.job.run_folder / FITTED_HEADS, weights)
        dist.barrier()
        return True

    def _train_family(self, phases: list[str]) -> bool:
        recipe = self.family
        assert recipe is not None, "a family phase without a family recipe"
        shape = self._shape_of_teacher(recipe)
        costs = None
        if recipe.engine.placed_by == "measured":
            labels = [student.label for student in recipe.students]
            costs = agreed_costs(self.job.run_folder, labels, self.control)
        device = self._planned_device()
        plan, device, placing = place_family(recipe, shape, self.num_ranks, device, costs)
        target_device = torch.device("cpu") if plan.is_teacher_sharded else self.device
        teacher = load_teacher(recipe, *self.job.teacher_paths, target_device, self.storage)
        is_first = any(placement.first_rank == self.rank for placement in plan.placements)
        teacher_fingerprint = fingerprint(teacher.backbone.state_dict()) if is_first else ""
        if self.rank == 0:
            path = self.job.run_folder / "plan.json"
            before = json.loads(path.read_text()) if path.is_file() else {}
            facts = plan.to_json()
            write_json(path, facts if placing else timed_as(facts, before))
            if placing:
                note(self.job.run_folder, Event("placed", placing))
        groups = make_groups(plan, COLLECTIVE_TIMEOUT)
        names = self.saved[1].networks if self.saved is not None else ()
        context = PhaseContext(
            recipe,
            plan,
            groups,
            self._rank_context("train"),
            shape.spec,
            self._report,
            frozenset(names),
        )
        shard_teacher(context, teacher)
        family = Family(context, teacher, shape, self.first_steps, device)
        self.recorder.save_more(recipe.evaluate.every_s, recipe.evaluate.every_steps)
        for stage in recipe.parts:
            if recipe.phase_of(stage) in phases:
                phase = family.phase(stage)
                if not self._run_phase(phase, self._restore(phase)):
                    return False
        write_students(self.job, recipe, phase, shape.spec, teacher_fingerprint)
        return True

    def _planned_device(self) -> Device:
        """What the plan assumes, with the memory of the smallest device of the job. Collective over the world."""
        if self.device.type != "cuda":
            return DEFAULT_DEVICE
        total = torch.cuda.get_device_properties(self.device).total_memory
        smallest = torch.tensor([float(total)], device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return replace(DEFAULT_DEVICE, memory_gib=float(smallest) / 2**30)

    def _report(self, event: str) -> None:
        self.recorder.show("training", message=event)

    def _note_storage(self, text: str) -> None:
        """Shows what storage does, on every screen; the run folder may lie on the same."""
        text = f"rank {self.rank} on {socket.gethostname()}: {text}"
        note(self.job.run_folder, Event("storage", text))

    def _rank_context(self, images: str) -> RankContext:
        folder = self.job.run_folder
        index = ImageIndex.load(folder / "data" / images)
        return RankContext(self.device, folder, index, self.micro_batches, self.storage)

    def _restore(self, phase: Phase) -> int:
        """Loads the phase's networks if the checkpoint is of this phase; the step to go on from."""
        if self.saved is None or self.saved[1].phase != phase.name:
            return 0
        restore(phase, self.saved)
        return self.saved[1].step

    def _run_phase(self, phase: Phase, start_step: int) -> bool:
        started = time.monotonic()
        self.heartbeat.enter_phase(phase.name, start_step)
        self.recorder.start(phase, start_step)
        source = str(self.job.teacher_paths[0])
        fault_handler = FaultHandler(phase, self.job.run_folder, source)
        held = fault_handler.start(start_step, self.control)
        if start_step < phase.num_steps:
            memory = self.saver.prepare(phase, held)
            if self.copies is not None:
                self.copies.prepare(phase.name, memory, start_step)
        parts = self.recorder, self.saver, fault_handler, self.heartbeat
        finished = run_phase(phase, *parts, start_step, self.copies)
        if finished and start_step < phase.num_steps:
            self.heartbeat.enter("saving", phase.num_steps)
            self.saver.wait()
            held = fault_handler.before_save(phase.num_steps)
            self.saver.save(phase, phase.num_steps, held)
        self.saver.wait()
        if self.copies is not None:
            self.copies.wait()
        self.heartbeat.enter("between phases", phase.num_steps)
        self.recorder.finish_phase()
        phase.loader.close()
        if self.rank == 0:
            note_time(
                self.job.run_folder,
                phase.name,
                time.monotonic() - started,
                self.recorder.take_images(),
            )
        gc.collect()
        return finished


def find_sinks(engine: EngineSpec) -> list[SinkFactory]:
    """Factories of the metric sinks of installed packages that a recipe names."""
    names = [name for name in engine.metric_sinks if name not in BUILTIN[ExtensionKind.SINK]]
    return [find(ExtensionKind.SINK, name, "engine.metric_sinks") for name in dict.fromkeys(names)]
