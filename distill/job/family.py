"""The phases of a family: a frozen teacher and an engine for each student that this rank trains, over all stages."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill.engine.engine import Engine
from distill.errors import RecipeError
from distill.job.build import (
    PhaseContext,
    PhaseSpec,
    build_engine,
    build_phase,
    build_task,
    compute_dtype,
    freeze,
    objective_of,
    task_options,
)
from distill.listing.extensions import ExtensionKind, find
from distill.listing.storage import Storage
from distill.plan.flops import DEFAULT_DEVICE, Device
from distill.plan.from_recipe import (
    TeacherShape,
    heads_of_student,
    later_plans,
    plan_family,
)
from distill.recipe.keys import FamilyRecipe
from distill.recipe.networks import StudentSpec
from distill.recipe.schedules import FamilyStageSpec
from distill.train.balance import BalanceListener, Balancer
from distill.train.exchange import AllGather, Slices
from distill.train.phase import Phase
from distill.train.placing import write_costs
from distill.train.schedule import RateSchedule, lr_factors
from distill.train.student import SinkhornTargets, StudentTrainer, TargetBuilder
from distill.weights.containers import read_again
from distill.weights.heads import load_heads
from distill.weights.initial import init_key, load_initial
from distill.weights.load import load_backbone
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from students.relational import relational_term
from students.student import build_backbone, build_heads, seeded
from teacher.frozen import FrozenTeacher
from teacher.losses import ExtraTerm, LossTerm
from teacher.task import DistillationTask


def extra_terms(recipe: FamilyRecipe) -> tuple[ExtraTerm, ...]:
    """Makes the added loss terms of one student: the relational one, then those of installed packages in the order of their names.

    Raises:
        RecipeError: one has parameters, which no optimizer would get.
    """
    terms, relational = [], recipe.objective.relational
    if relational is not None:
        term = relational_term(relational.form, relational.temperature)
        terms.append(ExtraTerm("relational", relational.weight, term))
    for name, weight in sorted((recipe.objective.extra or {}).items()):
        make: Callable[[FamilyRecipe], LossTerm] = find(ExtensionKind.LOSS, name, "objective.extra")
        term = make(recipe)
        if isinstance(term, nn.Module) and any(True for _ in term.parameters()):
            raise RecipeError(
                f"objective.extra = {name}: has parameters, and no optimizer would train them",
                fix="Use a term without parameters; a student's network may have more of them.",
            )
        terms.append(ExtraTerm(f"extra_{name}", weight, term))
    return tuple(terms)


def load_teacher(
    recipe: FamilyRecipe, folder: Path, heads: Path | None, device: torch.device, storage: Storage
) -> FrozenTeacher:
    """A teacher from its folder and heads file, read again while storage refuses them; without heads where ``heads`` is None.

    The backbone goes to ``device`` in the recipe's precision; heads follow.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit each other.
    """
    dtype = compute_dtype(recipe)
    backbone, spec = read_again(
        storage, folder, lambda: load_backbone(folder, dtype=dtype, device=device)
    )
    both = None
    if heads is not None:
        both = read_again(storage, heads, lambda: load_heads(heads, spec.width))
    return freeze(recipe, device, backbone, both)


def shard_teacher(context: PhaseContext, teacher: FrozenTeacher) -> None:
    """Leaves each rank its part of a teacher that was loaded to the CPU, where the plan shards it. Collective over the world."""
    if not context.plan.is_teacher_sharded:
        return
    teacher.shard(context.groups.teacher, context.rank_context.device)
    teacher.to(context.rank_context.device)


class Family:
    """The students of a family over all of its stages, on one rank: an engine for each that it trains."""

    def __init__(
        self,
        context: PhaseContext,
        teacher: FrozenTeacher,
        shape: TeacherShape,
        first_steps: Mapping[str, int],
        device: Device = DEFAULT_DEVICE,
    ) -> None:
        """Builds the students; collective over the world.

        ``context``: of the first stage. ``first_steps``: where each student joined; its schedule begins
        there and ends with the others'. ``device``: what the first stage was planned for.
        """
        assert isinstance(context.recipe, FamilyRecipe), "students are a family's"
        self.recipe, self._context, self._teacher = context.recipe, context, teacher
        self._shape, self._first_steps, self._device = shape, first_steps, device
        self._trained = [
            (student, *self._engine(student))
            for student in self.recipe.students
            if context.groups.world_rank in context.placement(student.label).world_ranks
        ]

    def _engine(self, student: StudentSpec) -> tuple[Engine, TargetBuilder]:
        context, name, spec = self._context, student.label, student.backbone_spec()
        task, targets = _student(context, student, self._teacher, self._shape)
        if student.init is not None and name not in context.restored:
            load_initial(init_key(name), student.init, spec, task)
        factors = lr_factors(self.recipe.schedule, spec)
        return build_engine(context, name, task, factors, student.init), targets

    def phase(self, stage: FamilyStageSpec) -> Phase:
        """The phase of one stage. Collective over the world."""
        recipe, context = self.recipe.at_stage(stage), self._context
        plan, is_first = context.plan, stage == self.recipe.parts[0]
        if not is_first:
            num_ranks = context.plan.num_ranks
            plan = plan_family(self.recipe, self._shape, num_ranks, self._device, stage)
        if plan.is_teacher_sharded:
            self._teacher.pad_forwards(max(plan.largest_shares))
        first_step, context = (
            self.recipe.first_step(stage),
            replace(context, recipe=recipe, plan=plan),
        )
        trainers, rates = [], {}
        for student, engine, targets in self._trained:
            name, placement = student.label, context.placement(student.label)
            if isinstance(engine.module, DistillationTask):
                is_local = placement.koleo_is_local(engine.module.options.koleo_group)
                engine.module.gather_koleo(is_needed=not is_local)
            rates[name] = _student_rates(self.recipe, stage, student, self._first_steps[name])
            steps = None if student.steps is None else student.steps - first_step
            parts = context.parts_of(name)
            trainers.append(
                StudentTrainer(name, placement, engine, targets, parts=parts, num_steps=steps)
            )
        spec = PhaseSpec(
            self.recipe.phase_of(stage),
            range(first_step, first_step + stage.steps),
            objective_of(recipe.objective),
            rates,
            stage=stage,
            lookahead=recipe.engine.lookahead,
            exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
            later=later_plans(recipe, plan),
            has_frozen_teacher=True,
        )
        return _balanced(context, build_phase(context, spec, self._teacher, tuple(trainers)))


def _balanced(context: PhaseContext, phase: Phase) -> Phase:
    """The phase with shares that follow the speed of the ranks, where the plan leaves them free."""
    engine, first_step = context.recipe.engine, phase.first_step
    if not engine.balance or not context.plan.is_dithered:
        return phase
    folder, rank = context.rank_context.run_folder, context.groups.world_rank
    write = partial(write_costs, folder, rank)
    balancer = Balancer(
        phase.plan_schedule,
        context.groups.control,
        phase.loader,
        (phase.teaching, {trainer.name: trainer.training for trainer in phase.trainers}),
        lookahead=phase.lookahead,
        every=engine.balance,
        # ranks are those of the first stage, and so are the crops that count
        listener=BalanceListener(context.report, (lambda _: None) if first_step else write),
    )
    if not first_step:
        return replace(phase, after_step=balancer.after_step)
    return replace(phase, after_step=lambda step: balancer.after_step(first_step + step))


def _student(
    context: PhaseContext, student: StudentSpec, teacher: FrozenTeacher, shape: TeacherShape
) -> tuple[nn.Module, TargetBuilder]:
    """A student with fresh weights, and what makes its targets: heads if the teacher has them, projectors if not."""
    recipe, device = context.recipe, context.rank_context.device
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    spec, generator = student.backbone_spec(), seeded(recipe.seed, student.label)
    backbone = build_backbone(spec, generator, device)
    extra, scale, koleo = extra_terms(recipe), student.crop_scale, student.koleo_group
    options = task_options(
        recipe, masks_input=False, crop_scale=scale, extra=extra, koleo_group=koleo
    )
    if shape.heads is None:
        teacher_dim = shape.spec.width
        projectors = build_projectors(spec.width, teacher_dim, generator)
        num_ranks = len(context.placement(student.label).slices)
        task = FeatureTask(backbone, *projectors, options, num_ranks)
        return task, FeatureNormalizer(teacher_dim, device)
    assert teacher.dino_head is not None and teacher.ibot_head is not None, "shapes without heads"
    heads = build_heads(heads_of_student(student, spec, shape.heads), generator, device)
    network = build_task(context, student.label, (backbone, *heads), options)
    return network, SinkhornTargets(teacher.dino_head, teacher.ibot_head)


def _student_rates(
    recipe: FamilyRecipe, stage: FamilyStageSpec, student: StudentSpec, first_step: int
) -> RateSchedule:
    """Rates in a stage of a student that trains from ``first_step`` of the family on.

    A rate of the stage goes over those of its steps that the student trains, a momentum of the stage
    stays as set; the others go over all of the student's steps. A student's peak is the same multiple of
    the schedule's in all stages.
    """
    settings, all_settings = recipe.at_stage(stage).schedule, recipe.schedule
    lr = settings.lr
    if student.lr is not None:
        peak = student.lr if stage.lr is None else lr.peak * student.lr / all_settings.lr.peak
        lr = lr.model_copy(update={"peak": peak})
    steps = range(first_step, student.steps or all_settings.steps)
    lr_steps, start = steps, recipe.first_step(stage)
    if stage.lr is not None:
        lr_steps = range(max(start, steps.start), min(start + stage.steps, steps.stop))
    return RateSchedule(
        lr,
        settings.batch,
        steps,
        lr_steps=lr_steps,
        weight_decay=(settings.weight_decay, None),
        ema=(settings.ema, None if stage.ema is not None else settings.ema_end),
        freeze_prototypes=settings.freeze_prototypes,
        freeze_backbone=0 if student.init is None else student.init.freeze_backbone,
    )
