"""Recipe and plan to the objects of a phase: what a rank builds before its loop starts.

A family phase has a frozen teacher and its students. ``distill.job.pretraining`` has the phases in which
a network, or its heads, teach themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill.data.bad_samples import FILE as BAD_SAMPLES_FILE
from distill.data.index import ImageIndex
from distill.data.locations import Reader
from distill.engine.config import EngineSettings
from distill.engine.engine import Engine
from distill.errors import CheckpointError, RecipeError
from distill.job.to_data import build_feed, build_loader
from distill.listing.extensions import ExtensionKind, find
from distill.listing.storage import Storage
from distill.plan.by_step import PlanSchedule
from distill.plan.crop_sizes import crop_schedule
from distill.plan.from_recipe import Recipe, TeacherShape, heads_of_student, later_plans
from distill.plan.plan import Placement, Plan
from distill.recipe.init_keys import InitSpec
from distill.recipe.keys import FAMILY_PHASE, FamilyRecipe
from distill.recipe.networks import StudentSpec
from distill.recipe.schedules import ObjectiveSpec, StageSpec
from distill.train.balance import Balancer
from distill.train.exchange import AllGather, Slices
from distill.train.groups import Groups
from distill.train.masking import StepMasks
from distill.train.phase import Phase, Teacher, Trainer
from distill.train.schedule import ObjectiveRamp, RateSchedule, StepSchedule, lr_factors
from distill.train.student import SinkhornTargets, Stopwatch, StudentTrainer, TargetBuilder
from distill.weights.containers import read_again
from distill.weights.heads import load_heads
from distill.weights.initial import init_key, load_initial
from distill.weights.load import load_backbone
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from students.relational import relational_term
from students.shapes import BackboneSpec, grid_of
from students.student import build_backbone, build_heads, seeded
from teacher.frozen import FrozenTeacher
from teacher.heads import Head
from teacher.losses import ExtraTerm, LossTerm, Objective
from teacher.shapes import scaled_size
from teacher.task import DistillationTask, TaskOptions
from teacher.vit import ViT

IDS_PER_NETWORK = 1_000_000  # more than any has parameters and modules


@dataclass(frozen=True)
class RankContext:
    """Where a rank works: its device, its run folder, its images; and the limits of networks that ran out of memory."""

    device: torch.device
    run_folder: Path
    index: ImageIndex
    micro_batches: Mapping[str, int] = field(default_factory=dict)
    storage: Storage = field(default_factory=Storage)  # of the images


@dataclass(frozen=True)
class PhaseContext:
    """What the parts of a phase are built from, on one rank.

    ``teacher_spec`` is the teacher's backbone; ``report`` takes events that people should read;
    ``restored``: networks whose weights a checkpoint gives, so that none are read to start from.
    """

    recipe: Recipe
    plan: Plan
    groups: Groups
    rank_context: RankContext
    teacher_spec: BackboneSpec
    report: Callable[[str], None]
    restored: frozenset[str] = frozenset()

    def placement(self, name: str) -> Placement:
        """Where a network trains."""
        return next(p for p in self.plan.placements if p.name == name)

    def parts_of(self, name: str) -> tuple[slice, ...]:
        """The micro-batches of a network's slice on this rank."""
        limits = self.recipe.engine.micro_batch, self.rank_context.micro_batches.get(name)
        micro_batch = min((limit for limit in limits if limit is not None), default=None)
        return self.placement(name).parts_of(self.groups.world_rank, micro_batch)


def objective_of(spec: ObjectiveSpec, gram: float = 0.0) -> Objective:
    """The recipe's weights and the Gram weight of a stage."""
    return Objective(
        dino=spec.dino,
        ibot=spec.ibot,
        koleo=spec.koleo,
        local=spec.local,
        cosine=spec.cosine,
        smooth_l1=spec.smooth_l1,
        gram=gram,
    )


def task_options(
    recipe: Recipe,
    *,
    masks_input: bool,
    crop_scale: float = 1.0,
    survival: float = 1.0,
    extra: tuple[ExtraTerm, ...] = (),
) -> TaskOptions:
    """How a network of this recipe is trained."""
    return TaskOptions(masks_input, recipe.data.mean, recipe.data.std, crop_scale, survival, extra)


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
    init: InitSpec | None = None,
) -> Engine:
    """A task on its group, wrapped by an engine; ``init``: what it starts from. Collective over the group."""
    groups, parts = context.groups, context.parts_of(name)
    if context.recipe.engine.activation_checkpointing:
        for module in task.modules():
            if isinstance(module, ViT):
                module.checkpoint_activations()
    settings = EngineSettings(
        zero_stage=context.recipe.engine.zero,
        precision=context.recipe.engine.precision,
        gradient_clip=context.recipe.schedule.clip,
        images_per_rank=max(part.stop - part.start for part in parts),
        num_parts=len(parts),
        beta2=context.recipe.schedule.beta2,
        lr_factor=lr_factor,
        clip_by=context.recipe.schedule.clip_by,
        decays_tokens=context.recipe.schedule.token_decay,
        first_id=IDS_PER_NETWORK * [p.name for p in context.plan.placements].index(name),
        freezes_backbone=init is not None and init.freeze_backbone > 0,
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


@dataclass(frozen=True)
class PhaseSpec:
    """What differs between the phases of a recipe.

    ``steps``: in the stream of samples. ``rates``: of the networks that this rank trains. ``stage``: of
    pretraining. ``later``: plans for when networks are finished.
    """

    name: str
    steps: range
    objective: Objective
    rates: Mapping[str, RateSchedule]
    after_step: Callable[[int], None] | None = None
    stage: StageSpec | None = None
    ramp: ObjectiveRamp | None = None
    lookahead: int = 0
    exchange: type[Slices] | type[AllGather] = Slices
    later: Sequence[tuple[int, Plan]] = ()
    has_frozen_teacher: bool = False


def build_phase(
    context: PhaseContext, spec: PhaseSpec, teacher: Teacher, trainers: tuple[Trainer, ...]
) -> Phase:
    """Loader, masks, exchange and schedules around a teacher and the networks that it teaches."""
    recipe, plan, rank, rank_context = (
        context.recipe,
        context.plan,
        context.groups.world_rank,
        context.rank_context,
    )
    plan_schedule = PlanSchedule(plan, spec.later)
    crops = crop_schedule(recipe, spec.stage)
    feed = build_feed(
        recipe,
        rank_context.index,
        crops,
        rank_context.run_folder / BAD_SAMPLES_FILE,
        partial(plan_schedule.share, rank),
        spec.steps.stop,
    )
    feed.read_by(Reader(rank_context.storage))
    loader = build_loader(recipe, feed, crops, plan_schedule.most_images(rank), rank_context.device)
    numbers = recipe.schedule, recipe.seed, spec.objective
    schedule = StepSchedule(*numbers, crops, context.teacher_spec, spec.rates, spec.ramp)
    return Phase(
        name=spec.name,
        num_steps=len(spec.steps),
        first_step=spec.steps.start,
        lookahead=spec.lookahead,
        plan=plan,
        plan_schedule=plan_schedule,
        world_rank=rank,
        schedule=schedule,
        loader=loader,
        masks=StepMasks(
            recipe.masks, plan_schedule, rank, schedule.grid_hw, recipe.seed, rank_context.device
        ),
        teacher=teacher,
        teaching=Stopwatch(rank_context.device),
        exchange=spec.exchange(plan_schedule, rank, context.groups.exchange, rank_context.device),
        trainers=trainers,
        after_step=spec.after_step,
        has_frozen_teacher=spec.has_frozen_teacher,
    )


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
