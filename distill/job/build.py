"""Recipe and plan to the objects of a phase: what a rank builds before its loop starts.

``distill.job.family`` has the phase with a frozen teacher and its students, ``distill.job.pretraining``
the phases in which a network, or its heads, teach themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill.data.bad_samples import FILE as BAD_SAMPLES_FILE
from distill.data.index import ImageIndex
from distill.data.locations import Reader
from distill.engine.compile_choice import Compiling, compiling
from distill.engine.compiled import compile_parts, compile_trained
from distill.engine.config import EngineSettings
from distill.engine.engine import Engine
from distill.job.to_data import build_feed, build_loader
from distill.listing.storage import Storage
from distill.plan.crop_sizes import crop_schedule, teacher_grid, teacher_scale
from distill.plan.from_recipe import Recipe
from distill.plan.plan import Plan
from distill.plan.slices import Placement
from distill.recipe.init_keys import InitSpec
from distill.recipe.schedules import FamilyStageSpec, ObjectiveSpec
from distill.train.by_step import PlanSchedule
from distill.train.exchange import AllGather, Slices
from distill.train.groups import Groups
from distill.train.masking import StepMasks
from distill.train.phase import Phase, Teacher, Trainer
from distill.train.schedule import ObjectiveRamp, RateSchedule, StepSchedule, most_blocks
from distill.train.student import Stopwatch
from students.shapes import BackboneSpec
from teacher.frozen import FrozenTeacher
from teacher.heads import Head
from teacher.losses import ExtraTerm, Objective
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
        limit = self.rank_context.micro_batches.get(name)
        return self.placement(name).parts_of(self.groups.world_rank, limit)


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
    koleo_group: int | None = None,
) -> TaskOptions:
    """How a network of this recipe is trained; ``koleo_group``: None for the schedule's."""
    group = koleo_group or recipe.schedule.koleo_group
    pixels = recipe.data.mean, recipe.data.std, crop_scale
    return TaskOptions(masks_input, *pixels, survival, extra, group)


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
        placement.koleo_is_local(options.koleo_group),
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
    if _compiling(context.recipe, device).trained:
        is_first = context.placement(name).first_rank == groups.world_rank
        compile_trained(
            task.to(device), name, context.rank_context.run_folder if is_first else None
        )
    return Engine(task.to(device), groups.by_network[name], groups.alone, settings)


def _compiling(recipe: Recipe, device: torch.device) -> Compiling:
    return compiling(recipe.engine.compile, device.type, recipe.engine.zero)


def freeze(
    recipe: Recipe, device: torch.device, backbone: nn.Module, heads: tuple[Head, Head] | None
) -> FrozenTeacher:
    """A teacher in the recipe's precision, on its device, compiled where the recipe wants that."""
    teacher = FrozenTeacher(
        backbone,
        *(heads or (None, None)),
        mean=recipe.data.mean,
        std=recipe.data.std,
        micro_images=recipe.engine.teacher_micro_batch,
        crop_scale=teacher_scale(recipe),
    )
    teacher = teacher.to(device, compute_dtype(recipe))
    if _compiling(recipe, device).frozen:
        compile_parts(teacher)
    return teacher


@dataclass(frozen=True)
class PhaseSpec:
    """What differs between the phases of a recipe.

    ``steps``: in the stream of samples. ``rates``: of the networks that this rank trains. ``stage``: whose
    crops it has. ``later``: plans for when networks are finished.
    """

    name: str
    steps: range
    objective: Objective
    rates: Mapping[str, RateSchedule]
    after_step: Callable[[int], None] | None = None
    stage: FamilyStageSpec | None = None
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
    grid = partial(teacher_grid, recipe, context.teacher_spec)
    blocks = most_blocks(recipe, context.teacher_spec)
    schedule = StepSchedule(*numbers, crops, grid, spec.rates, spec.ramp, blocks)
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


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What networks of the recipe compute in."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
