"""The family phase: a frozen teacher and an engine for each student that this rank trains."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distill.errors import CheckpointError, RecipeError
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
from distill.plan.from_recipe import TeacherShape, heads_of_student, later_plans
from distill.recipe.keys import FAMILY_PHASE, FamilyRecipe
from distill.recipe.networks import StudentSpec
from distill.train.balance import Balancer
from distill.train.exchange import AllGather, Slices
from distill.train.phase import Phase
from distill.train.schedule import RateSchedule, lr_factors
from distill.train.student import SinkhornTargets, StudentTrainer, TargetBuilder
from distill.weights.containers import read_again
from distill.weights.heads import load_heads
from distill.weights.initial import init_key, load_initial
from distill.weights.load import load_backbone
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from students.relational import relational_term
from students.shapes import grid_of
from students.student import build_backbone, build_heads, seeded
from teacher.frozen import FrozenTeacher
from teacher.losses import ExtraTerm, LossTerm
from teacher.shapes import scaled_size


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
    teacher.pad_forwards(max(context.plan.largest_shares))


def family_phase(
    context: PhaseContext,
    teacher: FrozenTeacher,
    shape: TeacherShape,
    first_steps: Mapping[str, int],
) -> Phase:
    """The distillation phase: one engine per student this rank trains. Collective over the world.

    ``first_steps``: where each student joined; its schedule begins there and ends with the others'.
    """
    recipe = context.recipe
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    trainers, rates = [], {}
    for student, placement in zip(recipe.students, context.plan.placements, strict=True):
        name = student.label
        if context.groups.world_rank not in placement.world_ranks:
            continue
        task, targets = _student(context, student, teacher, shape)
        if student.init is not None and name not in context.restored:
            load_initial(init_key(name), student.init, student.backbone_spec(), task)
        factors = lr_factors(recipe.schedule, student.backbone_spec())
        engine = build_engine(context, name, task, factors, student.init)
        parts = context.parts_of(name)
        rates[name] = _student_rates(recipe, student, first_steps[name])
        trainers.append(
            StudentTrainer(name, placement, engine, targets, parts=parts, num_steps=student.steps)
        )
    spec = PhaseSpec(
        FAMILY_PHASE,
        range(recipe.schedule.steps),
        objective_of(recipe.objective),
        rates,
        lookahead=recipe.engine.lookahead,
        exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
        later=later_plans(recipe, context.plan),
        has_frozen_teacher=True,
    )
    phase = build_phase(context, spec, teacher, tuple(trainers))
    if not recipe.engine.balance or not context.plan.is_dithered:
        return phase
    balancer = Balancer(
        phase.plan_schedule,
        context.groups.control,
        phase.loader,
        (phase.teaching, [trainer.training for trainer in trainers]),
        lookahead=phase.lookahead,
        every=recipe.engine.balance,
        report=context.report,
    )
    return replace(phase, after_step=balancer.after_step)


def _student(
    context: PhaseContext, student: StudentSpec, teacher: FrozenTeacher, shape: TeacherShape
) -> tuple[nn.Module, TargetBuilder]:
    """A student with fresh weights, and what makes its targets: heads if the teacher has them, projectors if not."""
    recipe, device = context.recipe, context.rank_context.device
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    spec, generator = student.backbone_spec(), seeded(recipe.seed, student.label)
    size = recipe.crops.global_.size
    grid_hw, teacher_hw = (
        grid_of(spec, scaled_size(size, student.crop_scale)),
        grid_of(context.teacher_spec, size),
    )
    if grid_hw[0] > teacher_hw[0]:
        raise CheckpointError(
            f"students.{student.label}: its {grid_hw} patch grid is finer than the teacher's {teacher_hw}",
            fix="Choose a student whose stride is at least the teacher's patch size.",
        )
    backbone = build_backbone(spec, generator, device)
    extra, scale = extra_terms(recipe), student.crop_scale
    options = task_options(recipe, masks_input=False, crop_scale=scale, extra=extra)
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


def _student_rates(recipe: FamilyRecipe, student: StudentSpec, first_step: int) -> RateSchedule:
    """Rates of a student that trains from ``first_step`` of the family on."""
    settings, lr = recipe.schedule, recipe.schedule.lr
    if student.lr is not None:
        lr = lr.model_copy(update={"peak": student.lr})
    steps = range(first_step, student.steps or settings.steps)
    return RateSchedule(
        lr,
        settings.batch,
        steps,
        lr_steps=steps,
        weight_decay=(settings.weight_decay, None),
        ema=(settings.ema, settings.ema_end),
        freeze_prototypes=settings.freeze_prototypes,
        freeze_backbone=0 if student.init is None else student.init.freeze_backbone,
    )
