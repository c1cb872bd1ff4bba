"""``distill data show``: the images of one step, through the loader and the mask sampler that training uses."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distill.data.contact_sheet import render_contact_sheet, rows_of
from distill.data.mask_counts import mask_counts
from distill.data.masks import draw_masks
from distill.errors import RecipeError
from distill.job.prepare import training_index
from distill.job.to_data import build_feed, build_loader, decoding_of
from distill.listing.decode import UndecodableError, decode_rgb
from distill.plan.crop_sizes import crop_schedule, teacher_grid
from distill.plan.from_recipe import shape_of_recipe
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.schedules import FamilyStageSpec


def render_step(
    recipe: FamilyRecipe | TeacherRecipe,
    teacher_recipe: TeacherRecipe | None,
    *,
    step: int,
    num_images: int,
    stage: str | None,
    out: Path,
) -> Path:
    """``out``, now holding a contact sheet of the first images of a step, counted from the start of the stage that is named.

    Raises:
        RecipeError: no stage has that name.
        DataError: the recipe's images are missing.
        CheckpointError: the teacher's patch size is not known because its files are missing.
    """
    index = training_index(recipe.data, out.absolute().parent / ".photographs")
    shape = (
        shape_of_recipe(recipe)
        if isinstance(recipe, TeacherRecipe)
        else teacher_shape(recipe, teacher_recipe, has_files=False)
    )
    stage_spec = None
    if stage is not None:
        stage_spec = _stage_named(recipe, stage)
        step += recipe.first_step(stage_spec)
        recipe = recipe.at_stage(stage_spec)
    crops = crop_schedule(recipe, stage_spec)
    grid_hw = teacher_grid(recipe, shape.spec, crops.at(step).global_size)
    count = min(num_images, recipe.schedule.batch)
    feeds = [
        build_feed(recipe, index, crops, None, lambda _: range(count), step + 1) for _ in range(2)
    ]
    feeds[0].start(step)
    prepared = feeds[0].take()
    assert prepared is not None, "a step with images"
    images = [_picture(e, hw, recipe) for e, hw in zip(prepared.encoded, prepared.hw, strict=True)]
    loader = build_loader(recipe, feeds[1], crops, count, torch.device("cpu"))
    batch = loader.fetch(step)
    loader.close()
    feeds[0].close()
    counts = mask_counts(
        seed=recipe.seed,
        step=step,
        grid_hw=grid_hw,
        images_global=recipe.schedule.batch,
        probability=recipe.masks.probability,
        ratio=recipe.masks.ratio,
    )
    positions = np.arange(count)
    masks = draw_masks(
        seed=recipe.seed, step=step, counts=counts, positions=positions, grid_hw=grid_hw
    )
    return render_contact_sheet(rows_of(images, prepared.parameters), batch, masks, grid_hw, out)


def _picture(
    encoded: NDArray[np.uint8], hw: NDArray[np.int32], recipe: FamilyRecipe | TeacherRecipe
) -> NDArray[np.uint8]:
    """The image as training sees it; black where only its header is good, since the loader replaces it."""
    try:
        return decode_rgb(encoded, decoding_of(recipe.data).background)
    except UndecodableError:
        return np.zeros((*hw.tolist(), 3), np.uint8)


def _stage_named(recipe: FamilyRecipe | TeacherRecipe, name: str) -> FamilyStageSpec:
    stages = recipe.stages or ()
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages) or "none: it has one stretch of steps"
    raise RecipeError(f"--stage {name}: not a stage", fix=f"The recipe's stages: {known}.")
