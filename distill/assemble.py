"""Recipe and plan to the objects of a phase: what a rank builds before its loop starts.

A family phase has a frozen teacher and its students. ``distill.pretraining`` has the phases in which
a network, or its heads, teach themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from distill import schedule
from distill.balance import Balancer
from distill.budget import Needs, Student, head_parameters, needs_of
from distill.cost import (
    DEFAULT_DEVICE,
    CropShapes,
    Device,
    Heads,
    fitting_tflops,
    regression_tflops,
    teaching_tflops,
    training_tflops,
)
from distill.data.bad_samples import FILE as BAD_SAMPLES_FILE
from distill.data.index import ImageIndex
from distill.engine import Engine, EngineSettings, StepRates
from distill.errors import CheckpointError, PlanError
from distill.exchange import AllGather, Slices
from distill.groups import Groups
from distill.loop import Phase
from distill.masking import StepMasks
from distill.plan import Placement, Plan, Timetable, Work, make_plan, without
from distill.pupil import Assigner, Pupil, TargetMaker
from distill.recipe import (
    FAMILY_PHASE,
    HEADS_PHASE,
    FamilyRecipe,
    HeadsSpec,
    LrSpec,
    ObjectiveSpec,
    ScheduleSpec,
    StudentSpec,
    TeacherRecipe,
)
from distill.stopwatch import Stopwatch
from distill.supply import build_feed, build_loader, crop_schedule, has_own_colours
from distill.weights import load_backbone, load_heads
from students.catalog import BackboneSpec, build_backbone, count_parameters, init_weights_
from students.custom import CustomSpec
from students.objective import FeatureTrainee, Standardiser, build_projectors
from students.student import build_heads, grid_of, seeded, student_heads
from teacher.frozen import FrozenTeacher
from teacher.heads import Head, HeadShape
from teacher.trainee import KOLEO_GROUP, Objective, StepScalars, Trainee, TraineeTraits, scaled_size

ONLINE = "teacher"  # the name of the pretrained network in metrics, checkpoints and plans
Recipe = FamilyRecipe | TeacherRecipe


@dataclass(frozen=True)
class Site:
    """Where a rank works: its device, its run folder, its images."""

    device: torch.device
    run_folder: Path
    index: ImageIndex


@dataclass(frozen=True)
class TeacherShape:
    """A teacher before it is loaded or trained: its backbone, and its heads where it has any."""

    spec: BackboneSpec
    heads: Heads | None


@dataclass(frozen=True)
class Scene:
    """What the parts of a phase are built from, on one rank.

    ``grid_hw`` is the teacher's patch grid; ``tell`` takes events that people should read.
    """

    recipe: Recipe
    plan: Plan
    groups: Groups
    site: Site
    grid_hw: tuple[int, int]
    tell: Callable[[str], None]

    def placement(self, name: str) -> Placement:
        """Where a network trains."""
        return next(p for p in self.plan.placements if p.name == name)

    def parts_of(self, name: str) -> tuple[slice, ...]:
        """The micro-batches of a network's slice on this rank."""
        micro_batch = self.recipe.engine.micro_batch
        return self.placement(name).parts_of(self.groups.world_rank, micro_batch)


def crop_shapes(recipe: Recipe, grid_hw: tuple[int, int]) -> CropShapes:
    """Sizes and counts for the cost model; two global crops, each masked with the recipe's probability and mean ratio."""
    masked = 2 * recipe.masks.probability * sum(recipe.masks.ratio) / 2 * grid_hw[0] * grid_hw[1]
    return CropShapes(
        recipe.crops.global_.size, recipe.crops.local.size, recipe.crops.local.count, masked
    )


def plan_pretraining(
    recipe: TeacherRecipe, num_ranks: int, device: Device = DEFAULT_DEVICE
) -> Plan:
    """One network on all ranks, which teaches itself."""
    shape = shape_of_recipe(recipe)
    assert shape.heads is not None, "a pretrained teacher has heads"
    shapes = crop_shapes(recipe, grid_of(shape.spec, recipe.crops.global_.size))
    work = Work(ONLINE, device.seconds(training_tflops(shape.spec, shape.heads, shapes)), num_ranks)
    teach_s = device.seconds(teaching_tflops(shape.spec, shape.heads, shapes))
    whole = recipe.engine.micro_batch is not None
    plan = make_plan([work], teach_s, recipe.schedule.batch, num_ranks, has_whole_groups=whole)
    require_whole_groups(recipe, plan)
    return plan


def plan_fitting(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device = DEFAULT_DEVICE
) -> Plan:
    """Fresh heads on a frozen teacher, on all ranks; their EMA teaches them."""
    assert shape.heads is not None, "heads to fit have shapes"
    shapes = crop_shapes(recipe, grid_of(shape.spec, recipe.crops.global_.size))
    work = Work(
        HEADS_PHASE, device.seconds(fitting_tflops(shape.spec, shape.heads, shapes)), num_ranks
    )
    teach_s = device.seconds(teaching_tflops(shape.spec, shape.heads, shapes))
    return make_plan([work], teach_s, recipe.schedule.batch, num_ranks)


def plan_family(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device = DEFAULT_DEVICE
) -> Plan:
    """Students on ranks, the teacher in the gaps: whole on every rank where the device's memory allows, sharded where not."""
    sharding = recipe.engine.teacher_sharding
    plan = _plan_family(recipe, shape, num_ranks, device, is_sharded=sharding == "sharded")
    if sharding == "auto" and num_ranks > 1:
        most = family_needs(recipe, shape, plan).fullest.total
        if most > device.memory_gib:
            sharded = _plan_family(recipe, shape, num_ranks, device, is_sharded=True)
            if family_needs(recipe, shape, sharded).fullest.total <= device.memory_gib:
                return sharded
    return plan


def _plan_family(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device, *, is_sharded: bool
) -> Plan:
    shapes = crop_shapes(recipe, grid_of(shape.spec, recipe.crops.global_.size))
    works = []
    for student in recipe.students:
        spec, seen = student.backbone_spec(), shapes.scaled(student.crop_scale)
        if isinstance(spec, CustomSpec):
            _require_whole_patches(recipe, student, spec)
        if shape.heads is None:
            cost = regression_tflops(spec, shape.spec.width, seen)
        else:
            cost = training_tflops(spec, _heads_of(student, spec, shape.heads), seen)
        ranks = None if student.ranks == "auto" else student.ranks
        works.append(Work(student.label, device.seconds(cost), ranks))
    plan = make_plan(
        works,
        device.seconds(teaching_tflops(shape.spec, shape.heads, shapes)),
        recipe.schedule.batch,
        num_ranks,
        lookahead=recipe.engine.lookahead,
        unit=recipe.engine.teacher_micro_batch,
        has_even_shares=recipe.engine.exchange == "all_gather",
        is_teacher_sharded=is_sharded,
        has_whole_groups=recipe.engine.micro_batch is not None,
    )
    if recipe.objective.koleo and shape.heads is not None:
        require_whole_groups(recipe, plan)
    ends = [f"{s.label} is finished at step {s.steps:,}" for s in recipe.students if s.steps]
    return replace(plan, notes=(*plan.notes, *ends))


def require_whole_groups(recipe: Recipe, plan: Plan) -> None:
    """Micro-batches must not cut the groups of images that KoLeo compares.

    Raises:
        PlanError: names the network and batches that work.
    """
    micro_batch = recipe.engine.micro_batch
    for placement in plan.placements:
        parts = [placement.parts_of(rank, micro_batch) for rank in placement.world_ranks]
        whole = placement.koleo_is_local and all(
            part.start % KOLEO_GROUP == 0 for each in parts for part in each
        )
        if len(parts[0]) > 1 and not whole:
            unit = KOLEO_GROUP * len(placement.slices)
            near = max(unit, round(plan.images_global / unit) * unit)
            raise PlanError(
                f"engine.micro_batch = {micro_batch}: the slices of {placement.name} are not whole KoLeo groups of {KOLEO_GROUP} images",
                fix=f"Write schedule.batch: {near} (a multiple of {unit}), or leave micro_batch out.",
            )


def _require_whole_patches(recipe: FamilyRecipe, student: StudentSpec, spec: CustomSpec) -> None:
    """The rule that the recipe checks for networks it knows."""
    sizes = {"global.size": recipe.crops.global_.size, "eval_size": recipe.crops.input_size}
    if recipe.crops.local.count:
        sizes["local.size"] = recipe.crops.local.size
    for key, size in sizes.items():
        if scaled_size(size, student.crop_scale) % spec.stride:
            raise PlanError(
                f"crops.{key} = {size}: not a multiple of {spec.stride}, the stride of {student.label}",
                fix=f"Use a multiple of {spec.stride}.",
            )


def family_needs(recipe: FamilyRecipe, shape: TeacherShape, plan: Plan) -> Needs:
    """Memory and traffic of a family's plan."""
    grid_hw = grid_of(shape.spec, recipe.crops.global_.size)
    students = []
    for student in recipe.students:
        spec = student.backbone_spec()
        if shape.heads is None:
            extra = 2 * (spec.width + 1) * shape.spec.width
        else:
            extra = head_parameters(_heads_of(student, spec, shape.heads))
        parameters = count_parameters(spec) + extra
        students.append(Student(student.label, spec, parameters, student.crop_scale))
    return needs_of(
        plan,
        students,
        shape.spec,
        shape.heads,
        crop_shapes(recipe, grid_hw),
        zero_stage=recipe.engine.zero,
        lookahead=recipe.engine.lookahead,
        micro_batch=recipe.engine.micro_batch,
        patches=grid_hw[0] * grid_hw[1],
        has_colours=has_own_colours(recipe.data),
    )


def shape_of_recipe(recipe: TeacherRecipe) -> TeacherShape:
    """The teacher that a pretraining recipe will make."""
    spec = recipe.model.backbone_spec()
    return TeacherShape(spec, head_shapes(recipe.heads, spec.width))


def head_shapes(heads: HeadsSpec, width: int) -> Heads:
    """Shapes of the DINO and iBOT heads on a network of ``width``."""
    dino, ibot = (
        HeadShape(width, spec.hidden, spec.bottleneck, spec.prototypes)
        for spec in (heads.dino, heads.ibot)
    )
    return dino, ibot


def _heads_of(student: StudentSpec, spec: BackboneSpec, heads: Heads) -> Heads:
    widths = student.head_widths
    return student_heads(spec.width, *heads, widths.dino_hidden, widths.ibot_hidden)


def objective_of(spec: ObjectiveSpec, gram: float = 0.0) -> Objective:
    """The recipe's weights and the Gram weight of a stage."""
    return Objective(**spec.model_dump(), gram=gram)


def traits_of(recipe: Recipe, *, masks_input: bool, crop_scale: float = 1.0) -> TraineeTraits:
    """How a network of this recipe is trained."""
    return TraineeTraits(masks_input, recipe.data.mean, recipe.data.std, crop_scale)


def build_trainee(
    scene: Scene, name: str, network: tuple[nn.Module, Head, Head], traits: TraineeTraits
) -> Trainee:
    """A network with heads, on the group of ``name``."""
    placement = scene.placement(name)
    return Trainee(
        *network,
        traits,
        scene.groups.by_network[name],
        len(placement.slices),
        placement.koleo_is_local,
    )


def build_engine(scene: Scene, name: str, trainee: nn.Module) -> Engine:
    """A trainee on its group, wrapped by its own engine. Collective over the group."""
    groups, parts = scene.groups, scene.parts_of(name)
    settings = EngineSettings(
        zero_stage=scene.recipe.engine.zero,
        precision=scene.recipe.engine.precision,
        gradient_clip=scene.recipe.schedule.clip,
        images_per_rank=max(part.stop - part.start for part in parts),
        num_parts=len(parts),
    )
    device = scene.site.device
    return Engine(trainee.to(device), groups.by_network[name], groups.alone, settings)


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
    scene: Scene,
    name: str,
    steps: tuple[int, int],
    teacher: FrozenTeacher,
    pupils: tuple[Pupil, ...],
    objective: Objective,
    after_step: Callable[[int], None],
    *,
    anchor_resolution: int | None = None,
    lookahead: int = 0,
    exchange: type[Slices] | type[AllGather] = Slices,
    later: Sequence[tuple[int, Plan]] = (),
) -> Phase:
    """Loader, masks, exchange and schedules around a teacher and those it teaches.

    ``steps``: where the phase begins in the stream of samples, and its length. ``later``: plans for
    when networks are finished.
    """
    recipe, plan, rank, site = scene.recipe, scene.plan, scene.groups.world_rank, scene.site
    timetable = Timetable(plan, later)
    bounds, settings = recipe.schedule.rope_rescale, recipe.schedule
    crops = crop_schedule(recipe, anchor_resolution)
    feed = build_feed(
        recipe,
        site.index,
        crops,
        site.run_folder / BAD_SAMPLES_FILE,
        lambda step: timetable.at(step).share(rank, step),
        sum(steps),
    )
    loader = build_loader(recipe, feed, crops, timetable.most_images(rank), site.device)
    return Phase(
        name=name,
        num_steps=steps[1],
        first_step=steps[0],
        lookahead=lookahead,
        plan=plan,
        timetable=timetable,
        world_rank=rank,
        grid_hw=scene.grid_hw,
        loader=loader,
        masks=StepMasks(recipe.masks, timetable, rank, scene.grid_hw, recipe.seed, site.device),
        teacher=teacher,
        teaching=Stopwatch(site.device),
        exchange=exchange(timetable, rank, scene.groups.exchange, site.device),
        pupils=pupils,
        temperature=lambda step: schedule.teacher_temperature(settings, step),
        scalars=lambda step: StepScalars(
            objective, *schedule.rope_scales(bounds, recipe.seed, step)
        ),
        after_step=after_step,
    )


def step_rates(
    settings: ScheduleSpec, lr: LrSpec, momentum: Callable[[int], float], num_steps: int
) -> Callable[[int], StepRates]:
    """Learning rates, weight decay and EMA momentum of each step."""

    def rates(step: int) -> StepRates:
        value = schedule.learning_rate(lr, step, num_steps, settings.batch)
        frozen = step < settings.freeze_prototypes
        return StepRates(value, 0.0 if frozen else value, settings.weight_decay, momentum(step))

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


def shard_teacher(scene: Scene, teacher: FrozenTeacher) -> None:
    """Leaves each rank its part of a teacher that was loaded to the CPU, where the plan says so. Collective over the world."""
    if not scene.plan.is_teacher_sharded:
        return
    teacher.shard(scene.groups.teacher, scene.site.device)
    teacher.to(scene.site.device)
    most = max(scene.plan.largest_shares)
    teacher.min_forwards = -(-most // scene.recipe.engine.teacher_micro_batch)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What networks of the recipe compute in."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32


def family_phase(
    scene: Scene, teacher: FrozenTeacher, shape: TeacherShape, first_steps: Mapping[str, int]
) -> Phase:
    """The distillation phase: one engine per student this rank trains. Collective over the world.

    ``first_steps``: where each student joined; its own schedule begins there and ends with the others'.
    """
    recipe = scene.recipe
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    pupils = []
    for student, placement in zip(recipe.students, scene.plan.placements, strict=True):
        if scene.groups.world_rank not in placement.world_ranks:
            continue
        trainee, targets = _student(scene, student, teacher, shape)
        lr = recipe.schedule.lr
        if student.lr is not None:
            lr = lr.model_copy(update={"peak": student.lr})
        engine = build_engine(scene, student.label, trainee)
        end = student.steps or recipe.schedule.steps
        rates = _student_rates(recipe.schedule, lr, first_steps[student.label], end)
        parts = scene.parts_of(student.label)
        pupil = Pupil(
            student.label, placement, engine, rates, targets, parts=parts, num_steps=student.steps
        )
        pupils.append(pupil)
    objective = objective_of(recipe.objective)
    steps = (0, recipe.schedule.steps)
    phase = build_phase(
        scene,
        FAMILY_PHASE,
        steps,
        teacher,
        tuple(pupils),
        objective,
        lambda _: None,
        lookahead=recipe.engine.lookahead,
        exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
        later=later_plans(recipe, scene.plan),
    )
    if not recipe.engine.balance or not scene.plan.is_dithered:
        return phase
    balancer = Balancer(
        phase.timetable,
        scene.groups.world_rank,
        scene.groups.control,
        phase.loader,
        (phase.teaching, [pupil.training for pupil in pupils]),
        lookahead=phase.lookahead,
        every=recipe.engine.balance,
        tell=scene.tell,
    )
    return replace(phase, after_step=balancer.after_step)


def _student(
    scene: Scene, student: StudentSpec, teacher: FrozenTeacher, shape: TeacherShape
) -> tuple[nn.Module, TargetMaker]:
    """A student with fresh weights, and what makes its targets: heads if the teacher has them, projectors if not."""
    recipe, device = scene.recipe, scene.site.device
    spec, generator = student.backbone_spec(), seeded(recipe.seed, student.label)
    grid_hw = grid_of(spec, scaled_size(recipe.crops.global_.size, student.crop_scale))
    if grid_hw[0] > scene.grid_hw[0]:
        raise CheckpointError(
            f"students.{student.label}: its {grid_hw} patch grid is finer than the teacher's {scene.grid_hw}",
            fix="Choose a student whose stride is at least the teacher's patch size.",
        )
    backbone = build_backbone(spec)
    init_weights_(backbone, generator)
    traits = traits_of(recipe, masks_input=False, crop_scale=student.crop_scale)
    if shape.heads is None:
        taught = shape.spec.width
        projectors = build_projectors(spec.width, taught, generator)
        num_ranks = len(scene.placement(student.label).slices)
        trainee = FeatureTrainee(backbone, *projectors, traits, num_ranks)
        return trainee, Standardiser(taught, device)
    assert teacher.dino_head is not None and teacher.ibot_head is not None, "shapes without heads"
    heads = build_heads(*_heads_of(student, spec, shape.heads), generator)
    network = build_trainee(scene, student.label, (backbone, *heads), traits)
    return network, Assigner(teacher.dino_head, teacher.ibot_head)


def later_plans(recipe: FamilyRecipe, plan: Plan) -> tuple[tuple[int, Plan], ...]:
    """The plans from each step on at which a student is finished."""
    ends = {student.label: student.steps or recipe.schedule.steps for student in recipe.students}
    moments = sorted({end for end in ends.values() if end < recipe.schedule.steps})
    return tuple(
        (moment, without(plan, {name for name, end in ends.items() if end <= moment}))
        for moment in moments
    )


def _student_rates(
    settings: ScheduleSpec, lr: LrSpec, first_step: int, end: int
) -> Callable[[int], StepRates]:
    """Rates by the family's step, for a student that trains from ``first_step`` to ``end``."""
    num_steps = end - first_step

    def momentum(step: int) -> float:
        return schedule.student_momentum(settings.ema, step, num_steps)

    rates = step_rates(settings, lr, momentum, num_steps)
    return lambda step: rates(step - first_step)
