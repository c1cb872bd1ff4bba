"""What a plan needs: what fits, what is refused, and what is offered instead."""

from dataclasses import replace

import pytest

from distill.errors import PlanError
from distill.plan.flops import DEVICES, Device
from distill.plan.from_recipe import family_footprint, plan_family
from distill.plan.job import check_job, require_fit
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job

H100 = DEVICES["h100"]


def family(*overrides: str) -> FamilyRecipe:
    recipe, _ = load_job("family_vit", list(overrides))
    assert isinstance(recipe, FamilyRecipe)
    return recipe


def refused(recipe: FamilyRecipe, num_ranks: int, device: Device, phase: int = -1) -> PlanError:
    job = check_job(recipe, None, num_ranks, device, has_files=False)[phase]
    with pytest.raises(PlanError) as caught:
        require_fit(job, recipe, None, device)
    return caught.value


@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize("name", ["family_vit", pytest.param("family_all", marks=pytest.mark.slow)])
def test_recipes__fit_on_the_hardware_their_heads_name(name: str, num_ranks: int) -> None:
    recipe, _ = load_job(name, [])
    job = check_job(recipe, None, num_ranks, H100, has_files=False)[-1]
    require_fit(job, recipe, None, H100)


def test_require_fit__offers_smaller_micro_batches_first() -> None:
    error = refused(family("engine.micro_batch=null"), 64, H100)
    assert "GiB (activations" in error.message and "h100 has 80 GiB" in error.message
    assert error.fix.startswith("engine.micro_batch=32 needs ")
    offered = family("engine.micro_batch=32")
    require_fit(check_job(offered, None, 64, H100, has_files=False)[-1], offered, None, H100)


def test_require_fit__then_more_ranks_then_nothing() -> None:
    grouped = family("engine.micro_batch=16")
    error = refused(grouped, 8, replace(H100, memory_gib=42.0))
    assert error.fix.startswith("engine.micro_batch=16 on ")
    error = refused(grouped, 8, replace(H100, memory_gib=8.0))
    assert error.fix.startswith("No number of ranks tried makes room")


def test_plan_family__a_teacher_that_does_not_fit_is_sharded() -> None:
    recipe = family("engine.micro_batch=16")
    shape = teacher_shape(recipe, None, has_files=False)
    whole = plan_family(recipe, shape, 8, H100)
    assert not whole.is_teacher_sharded
    device = replace(H100, memory_gib=60.0)
    sharded = plan_family(recipe, shape, 8, device)
    assert sharded.is_teacher_sharded and len(set(sharded.exact_shares)) == 1
    saved = (
        family_footprint(recipe, shape, whole).fullest.teacher
        - family_footprint(recipe, shape, sharded).fullest.teacher
    )
    assert saved == pytest.approx(6.716e9 * 2 / 2**30 * (1 - 1 / 8 - 2 / 40), rel=0.01)
    forced = family("engine.micro_batch=16", "engine.teacher_sharding=replicated")
    assert not plan_family(forced, shape, 8, device).is_teacher_sharded


def test_job_plan__students_that_finish_early_shorten_the_rest() -> None:
    recipe = family()
    early, _ = load_job("family_vit", [f"students.4.steps={recipe.schedule.steps // 2}"])
    days = [
        check_job(each, None, 64, H100, has_files=False)[-1].to_json()["days"]
        for each in (recipe, early)
    ]
    assert 0.5 * days[0] < days[1] < 0.9 * days[0]


def test_fitting_needs__heads_alone_are_trained() -> None:
    """Backbone once, heads twice in what is computed with; with more ranks only the optimizer shrinks."""
    recipe = family("engine.micro_batch=32")
    jobs = [check_job(recipe, None, ranks, H100, has_files=False)[0] for ranks in (8, 64)]
    assert [job.name for job in jobs] == ["heads", "heads"]
    few, many = (job.footprint.fullest for job in jobs)
    assert few.teacher == many.teacher == pytest.approx(13.1, abs=0.1)
    assert few.optimizer == pytest.approx(8 * many.optimizer) == pytest.approx(3 * few.ema)
    assert 0 < few.weights < 0.1 * few.teacher
    error = refused(recipe, 8, replace(H100, memory_gib=16.0), phase=0)
    assert error.message.startswith("heads: rank 0 needs ")
    assert error.fix.startswith(("engine.micro_batch=", "No number"))
