"""Recipe and plan to the objects of a phase: what a rank builds before its loop starts.

A family phase has a frozen teacher and its students. ``distill.job.pretraining`` has the phases in which
a network, or its heads, teach themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from distill.data.bad_samples import FILE as BAD_SAMPLES_FILE
from distill.data.index import ImageIndex
from distill.engine.engine import Engine, EngineSettings, StepRates
from distill.errors import CheckpointError
from distill.plan.by_step import PlanSchedule
from distill.plan.from_recipe import Recipe, TeacherShape, heads_of_student, later_plans
from distill.plan.plan import Placement, Plan
from distill.recipe.keys import FAMILY_PHASE, FamilyRecipe
from distill.recipe.networks import StudentSpec
from distill.recipe.schedules import LrSpec, ObjectiveSpec, ScheduleSpec, StageSpec
from distill.recipe.to_data import build_feed, build_loader, crop_schedule
from distill.train import schedule
from distill.train.balance import Balancer
from distill.train.exchange import AllGather, Slices
from distill.train.groups import Groups
from distill.train.masking import StepMasks
from distill.train.phase import Phase
from distill.train.stopwatch import Stopwatch
from distill.train.student import SinkhornTargets, StudentTrainer, TargetBuilder
from distill.weights.heads import load_heads
from distill.weights.load import load_backbone
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from students.shapes import BackboneSpec, grid_of
from students.student import build_heads, seeded
from teacher.frozen import FrozenTeacher
from teacher.heads import Head
from teacher.shapes import scaled_size
from teacher.task import DistillationTask, Objective, StepScalars, TaskOptions
from teacher.vit import ViT

IDS_PER_NETWORK = 1_000_000  # more than any has parameters and modules


@dataclass(frozen=True)
class RankContext:
    """Where a rank works: its device, its run folder, its images."""

    device: torch.device
    run_folder: Path
    index: ImageIndex


@dataclass(frozen=True)
class PhaseContext:
    """What the parts of a phase are built from, on one rank.

    ``teacher_spec`` is the teacher's backbone; ``report`` takes events that people should read.
    """

    recipe: Recipe
    plan: Plan
    groups: Groups
    rank_context: RankContext
    teacher_spec: BackboneSpec
    report: Callable[[str], None]

    def placement(self, name: str) -> Placement:
        """Where a network trains."""
        return next(p for p in self.plan.placements if p.name == name)

    def parts_of(self, name: str) -> tuple[slice, ...]:
        """The micro-batches of a network's slice on this rank."""
        micro_batch = self.recipe.engine.micro_batch
        return self.placement(name).parts_of(self.groups.world_rank, micro_batch)


def objective_of(spec: ObjectiveSpec, gram: float = 0.0) -> Objective:
    """The recipe's weights and the Gram weight of a stage."""
    return Objective(**spec.model_dump(), gram=gram)


def task_options(
    recipe: Recipe, *, masks_input: bool, crop_scale: float = 1.0, survival: float = 1.0
) -> TaskOptions:
    """How a network of this recipe is trained."""
    return TaskOptions(masks_input, recipe.data.mean, recipe.data.std, crop_scale, survival)


def build_task(
    context: PhaseContext, name: str, network: tuple[nn.Module, Head, Head], options: TaskOptions
) -> DistillationTask:
    """A network with heads, on the group of ``name``."""
    placement = context.placement(name)
    return DistillationTask(
        *network,
        options,
        context.groups.by_network[name],
        len(placement.slices),
        placement.koleo_is_local,
    )


def build_engine(
    context: PhaseContext,
    name: str,
    task: nn.Module,
    lr_factor: Callable[[str], float] = lambda _: 1.0,
) -> Engine:
    """A task on its group, wrapped by an engine. Collective over the group."""
    groups, parts = context.groups, context.parts_of(name)
    if context.recipe.engine.activation_checkpointing:
        for module in task.modules():
            if isinstance(module, ViT):
                module.is_checkpointing = True
    settings = EngineSettings(
        zero_stage=context.recipe.engine.zero,
        precision=context.recipe.engine.precision,
        gradient_clip=context.recipe.schedule.clip,
        images_per_rank=max(part.stop - part.start for part in parts),
        num_parts=len(parts),
        beta2=context.recipe.schedule.beta2,
        lr_factor=lr_factor,
        first_id=IDS_PER_NETWORK * [p.name for p in context.plan.placements].index(name),
    )
    device = context.rank_context.device
    return Engine(task.to(device), groups.by_network[name], groups.alone, settings)


def freeze(
    recipe: Recipe, device: torch.device, backbone: nn.Module, heads: tuple[Head, Head] | None
) -> FrozenTeacher:
    """A teacher in the recipe's precision, on its device."""
    teacher = FrozenTeacher(
        backbone,
        *(heads or (None, None)),
        mean=recipe.data.mean,
        std=recipe.data.std,
        micro_images=recipe.engine.teacher_micro_batch,
    )
    return teacher.to(device, compute_dtype(recipe))


def build_phase(
    context: PhaseContext,
    name: str,
    steps: tuple[int, int],
    teacher: FrozenTeacher,
    trainers: tuple[StudentTrainer, ...],
    objective: Objective,
    after_step: Callable[[int], None],
    *,
    stage: StageSpec | None = None,
    lookahead: int = 0,
    exchange: type[Slices] | type[AllGather] = Slices,
    later: Sequence[tuple[int, Plan]] = (),
) -> Phase:
    """Loader, masks, exchange and schedules around a teacher and those it teaches.

    ``steps``: where the phase begins in the stream of samples, and its length. ``stage``: of
    pretraining. ``later``: plans for when networks are finished.
    """
    recipe, plan, rank, rank_context = (
        context.recipe,
        context.plan,
        context.groups.world_rank,
        context.rank_context,
    )
    plan_schedule = PlanSchedule(plan, later)
    bounds, settings = recipe.schedule.rope_rescale, recipe.schedule
    crops = crop_schedule(recipe, stage)
    feed = build_feed(
        recipe,
        rank_context.index,
        crops,
        rank_context.run_folder / BAD_SAMPLES_FILE,
        lambda step: plan_schedule.at(step).share(rank, step),
        sum(steps),
    )
    loader = build_loader(recipe, feed, crops, plan_schedule.most_images(rank), rank_context.device)

    def grid_at(step: int) -> tuple[int, int]:
        return grid_of(context.teacher_spec, crops.at(step).global_size)

    return Phase(
        name=name,
        num_steps=steps[1],
        first_step=steps[0],
        lookahead=lookahead,
        plan=plan,
        plan_schedule=plan_schedule,
        world_rank=rank,
        grid_at=grid_at,
        loader=loader,
        masks=StepMasks(
            recipe.masks, plan_schedule, rank, grid_at, recipe.seed, rank_context.device
        ),
        teacher=teacher,
        teaching=Stopwatch(rank_context.device),
        exchange=exchange(plan_schedule, rank, context.groups.exchange, rank_context.device),
        trainers=trainers,
        temperature=lambda step: schedule.teacher_temperature(settings, step),
        scalars=lambda step: StepScalars(
            objective, *schedule.rope_scales(bounds, recipe.seed, step)
        ),
        after_step=after_step,
    )


def step_rates(
    settings: ScheduleSpec,
    lr: LrSpec,
    momentum: Callable[[int], float],
    lr_steps: tuple[int, int],
    weight_decay: Callable[[int], float] | None = None,
) -> Callable[[int], StepRates]:
    """Learning rates, weight decay and EMA momentum of each step; ``lr_steps``: where the rate's schedule begins, and its length."""
    first, num_steps = lr_steps
    decay = weight_decay or (lambda _: settings.weight_decay)

    def rates(step: int) -> StepRates:
        value = schedule.learning_rate(lr, step - first, num_steps, settings.batch)
        frozen = step < settings.freeze_prototypes
        return StepRates(value, 0.0 if frozen else value, decay(step), momentum(step))

    return rates


def load_teacher(
    recipe: FamilyRecipe, folder: Path, heads: Path | None, device: torch.device
) -> FrozenTeacher:
    """A teacher from its folder and heads file; without heads where ``heads`` is None.

    The backbone goes to ``device`` in the recipe's precision; heads follow.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit each other.
    """
    backbone, spec = load_backbone(folder, dtype=compute_dtype(recipe), device=device)
    both = None if heads is None else load_heads(heads, spec.width)
    return freeze(recipe, device, backbone, both)


def shard_teacher(context: PhaseContext, teacher: FrozenTeacher) -> None:
    """Leaves each rank its part of a teacher that was loaded to the CPU, where the plan shards it. Collective over the world."""
    if not context.plan.is_teacher_sharded:
        return
    teacher.shard(context.groups.teacher, context.rank_context.device)
    teacher.to(context.rank_context.device)
    most = max(context.plan.largest_shares)
    teacher.min_forwards = -(-most // context.recipe.engine.teacher_micro_batch)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What networks of the recipe compute in."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32


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
    trainers = []
    for student, placement in zip(recipe.students, context.plan.placements, strict=True):
        if context.groups.world_rank not in placement.world_ranks:
            continue
        task, targets = _student(context, student, teacher, shape)
        lr = recipe.schedule.lr
        if student.lr is not None:
            lr = lr.model_copy(update={"peak": student.lr})
        engine = build_engine(context, student.label, task)
        end = student.steps or recipe.schedule.steps
        rates = _student_rates(recipe.schedule, lr, first_steps[student.label], end)
        parts = context.parts_of(student.label)
        trainer = StudentTrainer(
            student.label, placement, engine, rates, targets, parts=parts, num_steps=student.steps
        )
        trainers.append(trainer)
    objective = objective_of(recipe.objective)
    steps = (0, recipe.schedule.steps)
    phase = build_phase(
        context,
        FAMILY_PHASE,
        steps,
        teacher,
        tuple(trainers),
        objective,
        lambda _: None,
        lookahead=recipe.engine.lookahead,
        exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
        later=later_plans(recipe, context.plan),
    )
    if not recipe.engine.balance or not context.plan.is_dithered:
        return phase
    balancer = Balancer(
        phase.plan_schedule,
        context.groups.world_rank,
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
    backbone = spec.build()
    spec.init_(backbone, generator)
    options = task_options(recipe, masks_input=False, crop_scale=student.crop_scale)
    if shape.heads is None:
        teacher_dim = shape.spec.width
        projectors = build_projectors(spec.width, teacher_dim, generator)
        num_ranks = len(context.placement(student.label).slices)
        task = FeatureTask(backbone, *projectors, options, num_ranks)
        return task, FeatureNormalizer(teacher_dim, device)
    assert teacher.dino_head is not None and teacher.ibot_head is not None, "shapes without heads"
    heads = build_heads(*heads_of_student(student, spec, shape.heads), generator)
    network = build_task(context, student.label, (backbone, *heads), options)
    return network, SinkhornTargets(teacher.dino_head, teacher.ibot_head)


def _student_rates(
    settings: ScheduleSpec, lr: LrSpec, first_step: int, end: int
) -> Callable[[int], StepRates]:
    """Rates by the family's step, for a student that trains from ``first_step`` to ``end``."""
    num_steps = end - first_step

    def momentum(step: int) -> float:
        return schedule.cosine(settings.ema, 1.0, step, num_steps)

    rates = step_rates(settings, lr, momentum, (0, num_steps))
    return lambda step: rates(step - first_step)
