"""Networks that see the same crops at different sizes: one grid for masks and targets, costs, and what is refused."""

from pathlib import Path

import pytest

from distill.errors import PlanError, RecipeError
from distill.plan.crop_sizes import crop_schedule, teacher_grid
from distill.plan.flops import DEVICES
from distill.plan.from_recipe import family_footprint, plan_family, plan_fitting
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.reader import load_job
from tests.support.jobs import differing, run_distill, write_recipes

H100 = DEVICES["h100"]
DOUBLED = ("crops={global: 512, local: 224}", "teacher.crop_scale=0.5")


def family(*overrides: str) -> FamilyRecipe:
    recipe, _ = load_job("family_vit", list(overrides))
    assert isinstance(recipe, FamilyRecipe)
    return recipe


def test_plan__a_teacher_at_half_of_doubled_crops_costs_what_it_cost() -> None:
    """Only crops grow on the wire; masked patches and their targets stay those of 256 px."""
    halved = [f"students.{i}.crop_scale=0.5" for i in range(5)]
    before = family("crops={global: 256, local: 112}", "engine.micro_batch=16")
    after = family(*DOUBLED, *halved, "engine.micro_batch=16")
    shape = teacher_shape(before, None, has_files=False)
    plans = [plan_family(each, shape, 8, H100) for each in (before, after)]
    assert plans[0].teach_s == plans[1].teach_s
    assert plans[0].placements == plans[1].placements
    assert teacher_grid(after, shape.spec, 512) == teacher_grid(before, shape.spec, 256) == (16, 16)
    few, many = (
        family_footprint(each, shape, plan)
        for each, plan in zip((before, after), plans, strict=True)
    )
    assert few.fullest.activations == many.fullest.activations
    assert few.fullest.buffers < many.fullest.buffers
    crops = 3 * (2 * (512**2 - 256**2) + before.crops.local.count * (224**2 - 112**2))
    grown = [b - a for a, b in zip(few.sliced_bytes, many.sliced_bytes, strict=True)]
    assert any(grown) and not any(each % crops for each in grown)
    fits = [plan_fitting(each, shape, 8, H100) for each in (before, after)]
    assert fits[0].teach_s == fits[1].teach_s and fits[0].image_s == fits[1].image_s


def test_plan__students_larger_than_the_teacher_cost_more() -> None:
    words = (
        "students=[convnext_tiny]",
        "crops={global: 512, local: 256}",
        "teacher.crop_scale=0.5",
    )
    full, half = family(*words), family(*words, "students.0.crop_scale=0.5")
    shape = teacher_shape(full, None, has_files=False)
    seconds = [plan_family(each, shape, 8, H100).image_s for each in (half, full)]
    assert seconds[1][0] > 3 * seconds[0][0]


def test_plan__a_student_with_finer_patches_than_a_given_teacher_is_refused() -> None:
    """The recipe alone cannot tell: it names the teacher's weights, the plan knows their patches."""
    shape = teacher_shape(family(), None, has_files=False)
    fine = family("students=[{arch: vits16, patch: 8}]")
    with pytest.raises(
        PlanError, match="32 x 32 patches in a global crop of 256 px are finer"
    ) as caught:
        plan_family(fine, shape, 8, H100)
    assert "patches of 16 px or more" in caught.value.fix
    half = family("students=[{arch: vits16, patch: 8, crop_scale: 0.5}]")
    assert plan_family(half, shape, 8, H100).placements
    with pytest.raises(PlanError, match="32 x 32 patches in a global crop of 512 px are finer"):
        plan_family(family("students=[vits16]", *DOUBLED), shape, 8, H100)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("crops={global: 96, local: 64}", "teacher.crop_scale=0.25"), "crops of 96 px are 24 px"),
        (
            ("crops={global: 512, local: 224, eval_size: 224}", "teacher.crop_scale=0.25"),
            "crops of 224 px are 56 px",
        ),
    ],
)
def test_plan__sizes_that_are_no_patches_of_a_given_teacher_are_refused(
    words: tuple[str, ...], text: str
) -> None:
    recipe = family("students=[convnext_tiny]", *words)
    shape = teacher_shape(recipe, None, has_files=False)
    with pytest.raises(PlanError, match=f"^teacher.crop_scale = 0.25: {text}"):
        plan_family(recipe, shape, 8, H100)


def test_plan__heads_are_fitted_on_local_crops_that_are_patches_too() -> None:
    recipe = family(
        "students=[convnext_tiny]", "crops={global: 512, local: 96}", "teacher.crop_scale=0.25"
    )
    shape = teacher_shape(recipe, None, has_files=False)
    with pytest.raises(PlanError, match="crops of 96 px are 24 px for the teacher"):
        plan_fitting(recipe, shape, 8, H100)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ("teacher.crop_scale=0.25",),
            "patches of 8 px at crop_scale 1 are finer than the teacher's 8 px at 0.25: use 32 px",
        ),
        (
            ("teacher.crop_scale=0.3",),
            "0.3 of crops.global.size = 32 is 9.6 px, not a multiple of the patch of 8",
        ),
        (("teacher.crop_scale=1.0e-9",), "not a multiple of the patch of 8"),
        (("teacher.crop_scale=2",), "teacher.crop_scale"),
        (("teacher:model.crop_scale=0.5",), "crop_scale"),
    ],
)
def test_load_job__a_scale_that_cannot_be(
    words: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    recipe = write_recipes(tmp_path, stage_steps=10, steps=20, save_every=1000)
    with pytest.raises(RecipeError) as caught:
        load_job(str(recipe), list(words))
    assert text in str(caught.value)


@pytest.mark.slow
def test_train__at_several_sizes_gives_the_same_bits_on_two_and_three_ranks(tmp_path: Path) -> None:
    """Teacher and ViTs at half of the crops, the ConvNeXt at all of them."""
    recipe = write_recipes(tmp_path, stage_steps=10, steps=6, save_every=1000)
    words = ["crops={global: {size: 64}, local: {count: 2, size: 32}}"]
    words += [f"students.{index}.ranks=1" for index in range(3)]
    words += [f"students.{index}.crop_scale=0.5" for index in range(2)]
    first = run(recipe, tmp_path / "two", *words, "teacher.crop_scale=0.5")
    source = f"teacher={{weights: {first / 'teacher'}, crop_scale: 0.5}}"
    other = "engine.processes=3", "engine.lookahead=2"
    assert differing(run(recipe, tmp_path / "three", *words, source, *other), first) == []
    source = f"teacher={{weights: {first / 'teacher'}, crop_scale: 0.25}}"
    ended = run_distill("check", str(recipe), *words, source)
    assert (
        ended.returncode == 2
        and "are finer than the teacher's 2 x 2" in ended.stdout + ended.stderr
    )
    fitted = "teacher={weights: WEIGHTS, heads: fit, crop_scale: 0.5, fit: {steps: 4, heads: {dino: {hidden: 16, bottleneck: 8, prototypes: 16}, ibot: {hidden: 16, bottleneck: 8, prototypes: 16}}}}"
    run(recipe, tmp_path / "fit", *words, fitted.replace("WEIGHTS", str(first / "teacher")))


def run(recipe: Path, out: Path, *words: str) -> Path:
    ended = run_distill("train", str(recipe), *words, "--out", str(out))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out / "tiny"


def test_crop_schedule__global_crops_are_reduced_where_a_stage_says_so() -> None:
    for word, reduces in (("cut", False), ("reduced", True)):
        recipe, _ = load_job("teacher_7b", [f"stages.1.gram.global_crops={word}"])
        assert isinstance(recipe, TeacherRecipe)
        kinds = [crop_schedule(recipe, stage).specs for stage in recipe.stages]
        assert [each[0].reduces_anchors for each in kinds] == [False, reduces, False]
        assert kinds[1][0].anchor_size == 512
