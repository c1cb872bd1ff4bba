"""From a recipe and a number of ranks to a plan and what it needs: what each network costs, from shapes alone.

``distill.plan.plan`` divides the work; this file computes what the work is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from distill.data.mask_counts import mean_masked
from distill.plan.crop_sizes import crop_schedule, teacher_grid, teacher_scale
from distill.plan.flops import (
    DEFAULT_DEVICE,
    CropShapes,
    Device,
    Heads,
    fitting_tflops,
    regression_tflops,
    teaching_tflops,
    training_tflops,
)
from distill.plan.memory import (
    PARAMETER_BYTES,
    PROJECTED_BYTES,
    Footprint,
    Student,
    Training,
    fitting_footprint,
    footprint_of,
    head_parameters,
    kept_bytes,
    logit_bytes,
    row_bytes,
    wire_shape,
)
from distill.plan.micro_batches import AUTO, fitted, fitted_alone, has_room, in_micro_batches
from distill.plan.placement import NetworkCost
from distill.plan.plan import RANKS_PER_NODE, Plan, PlanOptions, make_plan, without
from distill.plan.requirements import (
    require_as_many_parts,
    require_coarser_grid,
    require_full_groups,
    require_full_patches,
    require_uncut_groups,
)
from distill.recipe.keys import HEADS_PHASE, FamilyRecipe, TeacherRecipe
from distill.recipe.networks import HeadsSpec, StudentSpec
from distill.recipe.schedules import FamilyStageSpec
from distill.recipe.types import is_custom
from students.shapes import BackboneSpec, student_heads
from teacher.shapes import HeadShape

ONLINE = "teacher"  # the name of the pretrained network in metrics, checkpoints and plans
Recipe = FamilyRecipe | TeacherRecipe
RecipeT = TypeVar("RecipeT", FamilyRecipe, TeacherRecipe)


@dataclass(frozen=True)
class TeacherShape:
    """A teacher before it is loaded or trained: its backbone, and its heads where it has any."""

    spec: BackboneSpec
    heads: Heads | None


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


def heads_of_student(student: StudentSpec, spec: BackboneSpec, heads: Heads) -> Heads:
    """Shapes of a student's heads below a teacher with these."""
    widths = student.head_widths
    return student_heads(spec.width, *heads, widths.dino_hidden, widths.ibot_hidden)


def crop_shapes(recipe: Recipe, grid_hw: tuple[int, int]) -> CropShapes:
    """Sizes and counts for the cost model; masked patches at their mean."""
    masked = mean_masked(grid_hw, probability=recipe.masks.probability, ratio=recipe.masks.ratio)
    return CropShapes(
        recipe.crops.global_.size, recipe.crops.local.size, recipe.crops.local.count, masked
    )


def kinds_of(
    recipe: Recipe, stage: FamilyStageSpec, spec: BackboneSpec
) -> Iterator[tuple[float, CropShapes, int | None]]:
    """Kinds of batches of a stage under a teacher of a shape: the share of each, its crops, and the size of its anchor crops."""
    crops = crop_schedule(recipe, stage)
    quotas = crops.steps.quotas
    for kind, quota in zip(crops.specs, quotas, strict=True):
        grid_hw = teacher_grid(recipe, spec, kind.global_size)
        masked = crop_shapes(recipe, grid_hw).masked_per_image
        shapes = CropShapes(kind.global_size, kind.local_size, kind.num_local, masked)
        yield quota / sum(quotas), shapes, kind.anchor_size


def _fitting_shapes(recipe: FamilyRecipe, shape: TeacherShape) -> CropShapes:
    """Crops as a teacher sees them whose heads are fitted."""
    size, scale = recipe.crops.global_.size, teacher_scale(recipe)
    if scale != 1.0 and recipe.crops.local.count:
        teacher_grid(recipe, shape.spec, recipe.crops.local.size)
    return crop_shapes(recipe, teacher_grid(recipe, shape.spec, size)).scaled(scale)


def plan_fitting(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device = DEFAULT_DEVICE
) -> Plan:
    """Fresh heads on a frozen teacher, on all ranks; their EMA teaches them."""
    assert shape.heads is not None, "heads to fit have shapes"
    shapes = _fitting_shapes(recipe, shape)
    work = NetworkCost(
        HEADS_PHASE, device.seconds(fitting_tflops(shape.spec, shape.heads, shapes)), num_ranks
    )
    teach_s = device.teaching_s(teaching_tflops(shape.spec, shape.heads, shapes))
    plan = make_plan([work], teach_s, recipe.schedule.batch, num_ranks)
    if recipe.engine.micro_batch != AUTO:
        return in_micro_batches(plan, recipe.engine.micro_batch)

    def footprints(plans: Sequence[Plan]) -> list[Footprint]:
        return [fitting_footprint_of(recipe, shape, each) for each in plans]

    return fitted_alone([plan], footprints, device.memory_gib)[0]


def fitting_footprint_of(recipe: FamilyRecipe, shape: TeacherShape, plan: Plan) -> Footprint:
    """Memory while heads are fitted."""
    assert shape.heads is not None, "heads to fit have shapes"
    return fitting_footprint(
        plan,
        shape.spec,
        shape.heads,
        _fitting_shapes(recipe, shape),
        training_of(recipe),
    )


def training_of(recipe: Recipe) -> Training:
    """What a recipe's engine does that memory depends on."""
    engine = recipe.engine
    return Training(engine.zero, is_checkpointing=engine.activation_checkpointing)


def on_nodes_of(recipe: Recipe, ranks_per_node: int | None) -> Recipe:
    """Returns the recipe with a number of ranks per node where it gives none; None is not known."""
    if recipe.engine.ranks_per_node is not None or ranks_per_node is None:
        return recipe
    engine = recipe.engine.model_copy(update={"ranks_per_node": ranks_per_node})
    return recipe.model_copy(update={"engine": engine})


def plan_family(
    recipe: FamilyRecipe,
    shape: TeacherShape,
    num_ranks: int,
    device: Device = DEFAULT_DEVICE,
    stage: FamilyStageSpec | None = None,
) -> Plan:
    """Students on ranks, the teacher in the gaps; of a stage, by default the first.

    A student has the same ranks in all stages, those that suit the first. The teacher is replicated
    where the device's memory allows it in every stage, sharded where not.
    """
    sharding = recipe.engine.teacher_sharding
    plans = _plan_stages(recipe, shape, num_ranks, device, is_sharded=sharding == "sharded")
    may_shard = sharding == "auto" and num_ranks > 1
    if may_shard and _most_memory(recipe, shape, plans) > device.memory_gib:
        sharded = _plan_stages(recipe, shape, num_ranks, device, is_sharded=True)
        if _most_memory(recipe, shape, sharded) <= device.memory_gib:
            plans = sharded
    return plans[0 if stage is None else recipe.parts.index(stage)]


def _most_memory(recipe: FamilyRecipe, shape: TeacherShape, plans: Sequence[Plan]) -> float:
    """GiB of the fullest rank of any stage."""
    return max(each.fullest.total for each in _footprints(recipe, shape, plans))


def _footprints(
    recipe: FamilyRecipe, shape: TeacherShape, plans: Sequence[Plan]
) -> list[Footprint]:
    """What each stage needs."""
    pairs = zip(recipe.parts, plans, strict=True)
    return [family_footprint(recipe, shape, plan, stage) for stage, plan in pairs]


def _plan_stages(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device, *, is_sharded: bool
) -> tuple[Plan, ...]:
    """The plans of all stages; a student's engine adds up as many micro-batches in each."""
    if recipe.engine.micro_batch == AUTO:
        plans = _plan_stages(in_slices(recipe), shape, num_ranks, device, is_sharded=is_sharded)
        if has_room(_footprints(recipe, shape, plans), device.memory_gib):
            return plans
    first, *others = recipe.parts
    placed = _plan_family(recipe, shape, num_ranks, device, first, is_sharded=is_sharded)
    found = [placed]
    for stage in others:
        plan = _plan_family(
            recipe, shape, num_ranks, device, stage, is_sharded=is_sharded, placed=placed
        )
        for each, before in zip(plan.placements, placed.placements, strict=True):
            what = f"{each.num_parts} micro-batches a step of {each.name}"
            counts = each.num_parts, before.num_parts
            require_as_many_parts(recipe, what, counts, (stage.name, first.name))
        found.append(plan)
    if recipe.engine.micro_batch != AUTO:
        return tuple(found)
    image_bytes = [_image_bytes(recipe, shape, stage) for stage in recipe.parts]
    footprints = partial(_footprints, recipe, shape)
    return fitted(found, footprints, image_bytes, device.memory_gib, _uncut(recipe))


def in_slices(recipe: RecipeT) -> RecipeT:
    """The recipe with slices at once, which need not be full KoLeo groups."""
    engine = recipe.engine.model_copy(update={"micro_batch": None})
    return recipe.model_copy(update={"engine": engine})


def _uncut(recipe: FamilyRecipe) -> set[str]:
    """Students whose KoLeo groups are not cut: BatchNorm normalises them, and ZeRO 3 gathers weights in one order only."""
    return {
        student.label
        for student in recipe.students
        if recipe.engine.zero == 3 or student.backbone_spec().has_batch_norm
    }


def _image_bytes(
    recipe: FamilyRecipe, shape: TeacherShape, stage: FamilyStageSpec
) -> dict[str, float]:
    """What an image takes in memory while each student trains on it, at the largest crops of a stage."""
    kinds = [crops for _, crops, _ in kinds_of(recipe, stage, shape.spec)]
    return {
        student.name: max(
            kept_bytes(student, crops) + (logit_bytes(crops) if shape.heads else 0.0)
            for crops in kinds
        )
        for student in _students(recipe, shape)
    }


def _plan_family(
    recipe: FamilyRecipe,
    shape: TeacherShape,
    num_ranks: int,
    device: Device,
    stage: FamilyStageSpec,
    *,
    is_sharded: bool,
    placed: Plan | None = None,
) -> Plan:
    """A stage's plan, with the ranks of ``placed`` where that is given."""
    works, teach_s = _family_work(recipe, shape, device, stage)
    normed = {s.label for s in recipe.students if s.backbone_spec().has_batch_norm}
    if placed is not None:
        works = [
            replace(work, ranks=placement.world_ranks)
            for work, placement in zip(works, placed.placements, strict=True)
        ]
    plan = make_plan(
        works,
        teach_s,
        recipe.at_stage(stage).schedule.batch,
        num_ranks,
        PlanOptions(
            lookahead=recipe.engine.lookahead,
            unit=recipe.engine.teacher_micro_batch,
            has_even_shares=recipe.engine.exchange == "all_gather",
            is_teacher_sharded=is_sharded,
            has_full_groups=recipe.engine.micro_batch is not None or bool(normed),
            ranks_per_node=recipe.engine.ranks_per_node or RANKS_PER_NODE,
        ),
    )
    plan = in_micro_batches(plan, recipe.engine.micro_batch)
    if recipe.objective.koleo and shape.heads is not None:
        require_full_groups(recipe, plan)
    for placement in plan.placements:
        if placement.name in normed:
            require_uncut_groups(recipe, placement)
    ends = [f"{s.label} is finished at step {s.steps:,}" for s in recipe.students if s.steps]
    return replace(plan, notes=(*plan.notes, *ends))


def _family_work(
    recipe: FamilyRecipe, shape: TeacherShape, device: Device, stage: FamilyStageSpec
) -> tuple[list[NetworkCost], float]:
    """What each student and the teacher take per image, as means over a stage's sizes of crops."""
    kinds = [(share, shapes) for share, shapes, _ in kinds_of(recipe, stage, shape.spec)]
    if teacher_scale(recipe) != 1.0:
        teacher_grid(recipe, shape.spec, recipe.crops.input_size)  # it is scored, too
    works = []
    for student in recipe.students:
        spec, image_s = student.backbone_spec(), 0.0
        if is_custom(student.arch):
            require_full_patches(recipe, student, spec)
        for share, shapes in kinds:
            grid_hw = teacher_grid(recipe, shape.spec, shapes.global_size)
            require_coarser_grid(student, spec, shapes.global_size, grid_hw[0])
            scaled = shapes.scaled(student.crop_scale)
            if shape.heads is None:
                cost = regression_tflops(spec, shape.spec.width, scaled)
            else:
                cost = training_tflops(spec, heads_of_student(student, spec, shape.heads), scaled)
            image_s += share * device.seconds(cost)
        works.append(NetworkCost(student.label, image_s, student.requested_ranks))
    teach_s = sum(
        share
        * device.seconds(
            teaching_tflops(shape.spec, shape.heads, shapes.scaled(teacher_scale(recipe)))
        )
        for share, shapes in kinds
    )
    costs, first = device.costs, recipe.parts[0]
    if costs is None:
        return works, teach_s
    base = works, teach_s
    if stage != first:  # what was measured are the first stage's crops
        base = _family_work(recipe, shape, replace(device, costs=None), first)
    works = [
        replace(work, image_s=costs.training_s(work.name) * (work.image_s / before.image_s))
        for work, before in zip(works, base[0], strict=True)
    ]
    return works, costs.teach_s * (teach_s / base[1])


def family_footprint(
    recipe: FamilyRecipe, shape: TeacherShape, plan: Plan, stage: FamilyStageSpec | None = None
) -> Footprint:
    """Memory and traffic of a family's plan; of a stage, by default the first, at its largest crops."""
    kinds = [crops for _, crops, _ in kinds_of(recipe, stage or recipe.parts[0], shape.spec)]
    found = [_footprint_at(recipe, shape, plan, crops) for crops in kinds]
    return max(found, key=lambda footprint: footprint.fullest.total)


def _footprint_at(
    recipe: FamilyRecipe, shape: TeacherShape, plan: Plan, crops: CropShapes
) -> Footprint:
    grid_hw = teacher_grid(recipe, shape.spec, crops.global_size)
    students = _students(recipe, shape)
    patches = grid_hw[0] * grid_hw[1]
    has_stats = recipe.data.has_source_stats
    wire = wire_shape(crops, shape.heads, shape.spec.width, patches, has_pixel_stats=has_stats)
    training = replace(training_of(recipe), lookahead=recipe.engine.lookahead)
    return footprint_of(plan, students, shape.spec, shape.heads, crops, training, wire)


def _students(recipe: FamilyRecipe, shape: TeacherShape) -> list[Student]:
    """What memory knows of each student, with its heads."""
    students = []
    for student in recipe.students:
        spec = student.backbone_spec()
        if shape.heads is None:
            extra = 2 * (spec.width + 1) * shape.spec.width
            of_row = PARAMETER_BYTES * spec.width + PROJECTED_BYTES * shape.spec.width
            of_rows = of_row, of_row
        else:
            heads = heads_of_student(student, spec, shape.heads)
            extra, of_rows = head_parameters(heads), row_bytes(heads)
        parameters = spec.parameters + extra
        students.append(Student(student.label, spec, parameters, of_rows, student.crop_scale))
    return students


def later_plans(recipe: FamilyRecipe, plan: Plan) -> tuple[tuple[int, Plan], ...]:
    """The plans of a stage from each step of the family on at which a student is finished."""
    ends = {student.label: student.steps or recipe.schedule.steps for student in recipe.students}
    steps = sorted({end for end in ends.values() if end < recipe.schedule.steps})
    return tuple(
        (step, without(plan, {name for name, end in ends.items() if end <= step})) for step in steps
    )
