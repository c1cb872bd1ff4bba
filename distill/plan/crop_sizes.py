"""Recipe to the sizes of crops, of each stage and step; apart from ``distill.job.to_data`` because planning imports no torch."""

from collections.abc import Sequence

from distill.data.crops import CropSchedule, CropSpec
from distill.errors import PlanError
from distill.recipe.crop_rules import is_multiple
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.schedules import FamilyStageSpec
from students.shapes import BackboneSpec, grid_of
from teacher.shapes import scaled_size


def crop_schedule(
    recipe: FamilyRecipe | TeacherRecipe, stage: FamilyStageSpec | None = None
) -> CropSchedule:
    """The loader's crops for a recipe; in a stage with its sizes, and anchor crops where it has an anchor."""
    crops = recipe.crops
    kinds: Sequence[tuple[int, int, float]] = ((crops.global_.size, crops.local.size, 1.0),)
    if stage is not None and stage.crops is not None:
        kinds = [(kind.global_, kind.local, kind.ratio) for kind in stage.crops]
    anchor = None if stage is None else stage.anchor
    specs = [
        CropSpec(
            global_size=global_size,
            global_scale=crops.global_.scale,
            num_local=crops.local.count,
            local_size=local_size,
            local_scale=crops.local.scale,
            anchor_size=None if anchor is None else round(anchor.resolution * global_size),
            flip_probability=crops.flip,
            blur_sigma=crops.blur_sigma,
            blur=crops.blur,
            contrast_about=crops.contrast_about,
            reduces_anchors=anchor is not None and anchor.global_crops == "reduced",
        )
        for global_size, local_size, _ in kinds
    ]
    return CropSchedule.of(specs, [ratio for *_, ratio in kinds], recipe.seed)


def teacher_scale(recipe: FamilyRecipe | TeacherRecipe) -> float:
    """The part of a crop's size at which the teacher sees it; a network that teaches itself sees all of it."""
    return recipe.teacher.crop_scale if isinstance(recipe, FamilyRecipe) else 1.0


def teacher_grid(
    recipe: FamilyRecipe | TeacherRecipe, spec: BackboneSpec, size: int
) -> tuple[int, int]:
    """The teacher's patch grid (height, width) on global crops of ``size`` pixels, which masks and patch targets lie on.

    Raises:
        PlanError: what the teacher sees of them is not a multiple of its patch.
    """
    scale = teacher_scale(recipe)
    if not is_multiple(size * scale, spec.stride):
        at = f"teacher.crop_scale = {scale:g}: " if scale != 1.0 else ""
        raise PlanError(
            f"{at}crops of {size} px are {size * scale:g} px for the teacher, not a multiple of its patch of {spec.stride}",
            fix=f"Use sizes that give the teacher a multiple of {spec.stride}.",
        )
    return grid_of(spec, scaled_size(size, scale))
