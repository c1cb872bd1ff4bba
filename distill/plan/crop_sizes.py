"""Recipe to the sizes of crops, of each stage and step; apart from ``distill.job.to_data`` because planning imports no torch."""

from collections.abc import Sequence

from distill.data.crops import CropSchedule, CropSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.schedules import FamilyStageSpec


def crop_schedule(
    recipe: FamilyRecipe | TeacherRecipe, stage: FamilyStageSpec | None = None
) -> CropSchedule:
    """The loader's crops for a recipe; in a stage with its sizes, and anchor crops where it has an anchor."""
    crops = recipe.crops
    kinds: Sequence[tuple[int, int, float]] = ((crops.global_.size, crops.local.size, 1.0),)
    if stage is not None and stage.crops is not None:
        kinds = [(kind.global_, kind.local, kind.ratio) for kind in stage.crops]
    times = None if stage is None else stage.anchor_resolution
    specs = [
        CropSpec(
            global_size=global_size,
            global_scale=crops.global_.scale,
            num_local=crops.local.count,
            local_size=local_size,
            local_scale=crops.local.scale,
            anchor_size=None if times is None else round(times * global_size),
            flip_probability=crops.flip,
            blur_sigma=crops.blur_sigma,
            blur=crops.blur,
            contrast_about=crops.contrast_about,
        )
        for global_size, local_size, _ in kinds
    ]
    return CropSchedule.of(specs, [ratio for *_, ratio in kinds], recipe.seed)
