"""What a plan must be to the networks that it places: groups of images that are not cut, and grids of patches that meet."""

from distill.errors import PlanError
from distill.plan.plan import Plan
from distill.plan.slices import Placement
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.networks import StudentSpec
from students.shapes import BackboneSpec
from teacher.shapes import KOLEO_GROUP, scaled_size

Recipe = FamilyRecipe | TeacherRecipe


def require_full_groups(recipe: Recipe, plan: Plan) -> None:
    """Micro-batches must not cut the groups of images that KoLeo compares.

    Raises:
        PlanError: names the network and batches that work.
    """
    micro_batch = recipe.engine.micro_batch
    if not isinstance(micro_batch, int):
        return
    for placement in plan.placements:
        parts = [placement.parts_of(rank) for rank in placement.world_ranks]
        in_groups = placement.koleo_is_local(KOLEO_GROUP) and all(
            part.start % KOLEO_GROUP == 0 for each in parts for part in each
        )
        if len(parts[0]) > 1 and not in_groups:
            unit = KOLEO_GROUP * len(placement.slices)
            near = max(unit, round(plan.images_global / unit) * unit)
            raise PlanError(
                f"engine.micro_batch = {micro_batch}: the slices of {placement.name} are not multiples of the KoLeo group of {KOLEO_GROUP} images",
                fix=f"Write schedule.batch: {near} (a multiple of {unit}), or leave micro_batch out.",
            )


def require_as_many_parts(
    recipe: Recipe, what: str, parts: tuple[int, int], stages: tuple[str, str]
) -> None:
    """A network has as many micro-batches a step in a stage as in the first; ``what`` names those of the stage.

    Raises:
        PlanError: names both numbers, and what makes them one.
    """
    if parts[0] != parts[1]:
        raise PlanError(
            f"engine.micro_batch = {recipe.engine.micro_batch}: {what} in stage {stages[0]}, {parts[1]} in {stages[1]}",
            fix="Choose batches or a micro_batch that give as many in all stages, or `micro_batch: auto`.",
        )


def require_uncut_groups(recipe: FamilyRecipe, placement: Placement) -> None:
    """BatchNorm normalises groups of images, which neither ranks nor micro-batches may cut."""
    num_ranks = len(placement.slices)
    parts = [placement.parts_of(rank) for rank in placement.world_ranks]
    starts = [each.start for each in placement.slices] + [p.start for each in parts for p in each]
    if any(start % KOLEO_GROUP for start in starts):
        raise PlanError(
            f"students.{placement.name}: its BatchNorm normalises groups of {KOLEO_GROUP} images, which {num_ranks} ranks "
            f"or micro-batches cut at schedule.batch = {recipe.schedule.batch}",
            fix=f"Use a batch that is a multiple of {KOLEO_GROUP * num_ranks} and micro-batches of {KOLEO_GROUP} or more, or give it ranks: 1.",
        )


def require_full_patches(recipe: FamilyRecipe, student: StudentSpec, spec: BackboneSpec) -> None:
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


def require_coarser_grid(
    student: StudentSpec, spec: BackboneSpec, size: int, teacher_side: int
) -> None:
    """Targets exist for the teacher's patches only: a coarser map of a student is resized to them, a finer one is refused."""
    scaled = scaled_size(size, student.crop_scale)
    side = scaled // spec.stride
    if side > teacher_side:
        raise PlanError(
            f"students.{student.label}: {side} x {side} patches in a global crop of {scaled} px are finer than the teacher's {teacher_side} x {teacher_side}",
            fix=f"Use patches of {-(-scaled // teacher_side)} px or more, a smaller crop_scale, or a larger one of the teacher.",
        )
