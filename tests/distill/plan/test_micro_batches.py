"""Micro-batches that the plan chooses: as few as fit, as many in every stage, none of them empty."""

import json

import pytest

from distill.plan.flops import DEVICES, Device
from distill.plan.from_recipe import family_footprint, plan_family
from distill.plan.micro_batches import FULL, most_parts
from distill.plan.plan import Plan
from distill.plan.pretraining import plan_stage, stage_footprint
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.reader import load_job
from tests.support.command import Run

H100 = DEVICES["h100"]


def family_of(name: str, *words: str) -> FamilyRecipe:
    recipe, _ = load_job(name, words)
    assert isinstance(recipe, FamilyRecipe)
    return recipe


def plans_of(
    recipe: FamilyRecipe, num_ranks: int, device: Device = H100
) -> tuple[list[Plan], float]:
    """The plans of all stages, and the GiB of the fullest rank."""
    shape = teacher_shape(recipe, None, has_files=False)
    plans = [plan_family(recipe, shape, num_ranks, device, stage) for stage in recipe.parts]
    most = max(
        family_footprint(recipe, shape, plan, stage).fullest.total
        for plan, stage in zip(plans, recipe.parts, strict=True)
    )
    return plans, most


def parts(plan: Plan) -> dict[str, int]:
    return {each.name: each.num_parts for each in plan.placements}


def test_auto__as_few_as_fit() -> None:
    (fixed,), _ = plans_of(family_of("family_vit", "engine.micro_batch=16"), 64)
    (plan,), most = plans_of(family_of("family_vit", "engine.micro_batch=auto"), 64)
    assert most <= FULL * H100.memory_gib and plan.step_s == pytest.approx(fixed.step_s)
    found, before = parts(plan), parts(fixed)
    assert found["vits16"] < before["vits16"] / 10 and max(found.values()) > 1
    for placement in plan.placements:
        cut = [part for rank in placement.world_ranks for part in placement.parts_of(rank)]
        assert all(part.start % 16 == 0 for part in cut)


def test_auto__slices_at_once_where_they_fit_and_then_the_plan_is_that_of_null() -> None:
    whole = plans_of(family_of("family_reported", "stages=null"), 296)
    recipe = family_of("family_reported", "stages=null", "engine.micro_batch=auto")
    assert plans_of(recipe, 296) == whole


def test_auto__as_many_in_every_stage_as_the_fullest_needs() -> None:
    plans, most = plans_of(family_of("family_all"), 64)
    assert len(plans) == 3 and most <= H100.memory_gib
    assert len({json.dumps(parts(plan)) for plan in plans}) == 1
    (alone,), _ = plans_of(family_of("family_all", "stages=null"), 64)
    assert parts(alone) != parts(plans[0]), "crops of 768 px need more of them"


def test_auto__where_nothing_fits_as_many_as_there_can_be() -> None:
    small = Device("small", 100.0, memory_gib=8.0, efficiency=0.4)
    recipe = family_of("family_vit", "engine.micro_batch=auto")
    (plan,), most = plans_of(recipe, 64, small)
    assert most > 8.0
    assert any(each.num_parts == most_parts([plan], each.name, 1) for each in plan.placements)


def test_auto__of_a_pretrained_teacher() -> None:
    recipe, _ = load_job("teacher_7b", ("engine.micro_batch=auto",))
    assert isinstance(recipe, TeacherRecipe)
    plans = [plan_stage(recipe, stage, 64, H100) for stage in recipe.stages]
    needs = [
        stage_footprint(recipe, stage, plan).fullest.total
        for stage, plan in zip(recipe.stages, plans, strict=True)
    ]
    assert max(needs) <= FULL * H100.memory_gib
    assert {each.placements[0].num_parts for each in plans} == {2}


def test_plan__names_the_micro_batches_of_every_network(distill: Run) -> None:
    result = distill("plan", "family_vit", "--ranks", 64, "--device", "h100", "--json")
    plan = json.loads(result.out)
    assert plan["micro_batches"].keys() == plan["ranks"].keys()
    shown = distill("plan", "family_vit", "--ranks", 64, "--device", "h100").out
    assert "at once" in shown


@pytest.mark.parametrize("value", ["8", "24", "0", "all", "1.5"])
def test_micro_batch__of_another_kind_is_refused(distill: Run, value: str) -> None:
    result = distill("plan", "family_vit", f"engine.micro_batch={value}", "--ranks", 64)
    assert result.code == 2 and "engine.micro_batch" in result.err
