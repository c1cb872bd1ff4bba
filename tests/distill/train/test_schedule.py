import math
from functools import partial
from typing import cast

import pytest

from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.recipe.schedules import LrSpec, ScheduleSpec, TemperatureSpec
from distill.train.schedule import (
    ObjectiveRamp,
    cosine,
    learning_rate,
    lr_factors,
    rope_scales,
    teacher_temperature,
)
from students.shapes import CATALOG
from teacher.losses import Objective


def test_learning_rate__warms_up_then_stays() -> None:
    lr = LrSpec(peak=1.0, warmup=4)
    assert [learning_rate(lr, step, 100, 1024) for step in range(6)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]


def test_learning_rate__cosine_ends_at_the_end() -> None:
    lr = LrSpec(peak=1.0, end=0.1, warmup=10, decay="cosine")
    values = [learning_rate(lr, step, 111, 1024) for step in range(111)]
    assert (
        values[10] == 1.0
        and values[60] == pytest.approx(0.55)
        and values[110] == pytest.approx(0.1)
    )
    assert values[10:] == sorted(values[10:], reverse=True)


def test_learning_rate__stays_then_falls_over_the_last_steps() -> None:
    lr = LrSpec(peak=1.0, end=0.1, warmup=10, decay="cosine", decay_steps=21)
    values = [learning_rate(lr, step, 111, 1024) for step in range(111)]
    assert values[9:91] == [1.0] * 82
    assert values[100] == pytest.approx(0.55) and values[110] == pytest.approx(0.1)
    longer = lr.model_copy(update={"decay_steps": 500})  # no longer than the run
    whole = lr.model_copy(update={"decay_steps": None})
    assert [learning_rate(longer, step, 111, 1024) for step in range(111)] == [
        learning_rate(whole, step, 111, 1024) for step in range(111)
    ]


def test_learning_rate__the_rule_for_the_peak_alone_ends_at_the_end() -> None:
    for scale, end in (("sqrt_1024", 8e-6), ("sqrt_1024_peak", 1e-6)):
        lr = LrSpec.model_validate({"peak": 1e-3, "end": 1e-6, "decay": "cosine", "scale": scale})
        assert learning_rate(lr, 0, 50, 4096) == pytest.approx(8e-3)
        assert learning_rate(lr, 49, 50, 4096) == pytest.approx(end)


def test_recipes__family_reported_and_released_have_the_published_rates() -> None:
    reported, released = (
        cast(FamilyRecipe, load_job(name)[0]) for name in ("family_reported", "family_released")
    )
    at = partial(_rate, reported)
    top = 2e-4 * 4 * math.sqrt(1920 / 1024)
    assert at(10_000) == at(999_999) == pytest.approx(top)
    assert at(1_125_000) == pytest.approx(top / 2, rel=0.01) and at(1_249_999) < top / 150
    at = partial(_rate, released)
    assert at(0) < 1e-11 and at(6_249) == pytest.approx(2.634e-4 / 2)
    assert at(12_499) == at(24_999) == pytest.approx(5e-5 * 4 * math.sqrt(1776 / 1024), rel=1e-3)
    settings = released.schedule
    assert settings.teacher_temperature.start == settings.teacher_temperature.end == 0.07
    assert (settings.ema, settings.ema_end, settings.beta2) == (0.994, 1.0, 0.999)
    assert settings.rope_rescale == (0.5, 2.0)


def _rate(recipe: FamilyRecipe, step: int) -> float:
    """At a step of the family; a rate of a stage goes over the steps of the stage."""
    stage = next(s for s in reversed(recipe.parts) if recipe.first_step(s) <= step)
    settings = recipe.at_stage(stage).schedule
    if stage.lr is None:
        return learning_rate(settings.lr, step, settings.steps, settings.batch)
    return learning_rate(settings.lr, step - recipe.first_step(stage), stage.steps, settings.batch)


@pytest.mark.parametrize(("name", "end"), [("family_vit", 1_000_000), ("family_all", 1_250_000)])
def test_recipes__a_family_anneals(name: str, end: int) -> None:
    """Before the high-resolution stage, whose rate is a small constant."""
    recipe = cast(FamilyRecipe, load_job(name)[0])
    assert _rate(recipe, end - 1) < _rate(recipe, 20_000) / 150
    assert _rate(recipe, recipe.schedule.steps - 1) < _rate(recipe, 20_000) / 10


def test_recipes__teacher_vitl_in1k_ends_at_the_released_rate() -> None:
    recipe, _ = load_job("teacher_vitl_in1k")
    assert learning_rate(recipe.schedule.lr, 124_999, 125_000, 2048) == pytest.approx(1e-6)


def test_lr_factors__of_a_family() -> None:
    recipe, _ = load_job("family_released")
    vit = lr_factors(recipe.schedule, CATALOG["vits16"])
    assert vit("backbone.layer.11.norm1.weight") == pytest.approx(0.99)
    assert vit("backbone.layer.0.norm1.weight") == pytest.approx(0.99**12)
    assert vit("backbone.embeddings.patch_embeddings.weight") == pytest.approx(0.2 * 0.99**13)
    assert vit("backbone.embeddings.cls_token") == pytest.approx(0.99**13)
    assert vit("backbone.norm.weight") == vit("dino_head.layers.0.weight") == 1.0
    convnext = lr_factors(recipe.schedule, CATALOG["convnext_tiny"])
    assert convnext("backbone.stages.0.layers.0.gamma") == 1.0


def test_learning_rate__square_root_rule() -> None:
    lr = LrSpec(peak=1e-4, scale="sqrt_1024")
    assert learning_rate(lr, 0, 10, 4096) == pytest.approx(1e-4 * 4 * math.sqrt(4))


def test_teacher_temperature__linear_over_the_warm_up() -> None:
    schedule = ScheduleSpec(
        batch=1,
        lr=LrSpec(peak=1.0),
        teacher_temperature=TemperatureSpec(start=0.04, end=0.07, warmup=10),
    )
    assert teacher_temperature(schedule, 0) == 0.04
    assert teacher_temperature(schedule, 5) == pytest.approx(0.055)
    assert teacher_temperature(schedule, 10) == teacher_temperature(schedule, 99) == 0.07


def test_cosine__leads_to_its_end() -> None:
    assert cosine(0.99, 1.0, 0, 100) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 100, 100) == pytest.approx(1.0)
    assert cosine(0.04, 0.4, 50, 100) == pytest.approx(0.22)
    assert cosine(0.04, None, 50, 100) == 0.04


def test_learning_rate__rises_along_half_a_cosine() -> None:
    lr = LrSpec(peak=1.0, warmup=4, ramp="cosine")
    rates = [learning_rate(lr, step, 10, 1024) for step in range(5)]
    assert rates == pytest.approx([0.1464466, 0.5, 0.8535534, 1.0, 1.0])


def test_rope_scales__are_log_uniform_and_the_same_everywhere() -> None:
    draws = [cast(float, s) for step in range(500) for s in rope_scales((0.5, 2.0), 3, step)]
    assert min(draws) >= 0.5 and max(draws) <= 2.0
    assert abs(sum(map(math.log, draws)) / len(draws)) < 0.05  # standard error 0.013
    assert (
        rope_scales((0.5, 2.0), 3, 7)
        == rope_scales((0.5, 2.0), 3, 7)
        != rope_scales((0.5, 2.0), 4, 7)
    )
    assert rope_scales(None, 3, 7) == (1.0, 1.0)


def test_rope_scales__of_blocks_do_not_depend_on_how_many_there_are() -> None:
    of_two, of_five = (rope_scales((0.5, 2.0), 3, 7, count) for count in (2, 5))
    for few, many in zip(of_two, of_five, strict=True):
        assert isinstance(few, tuple) and isinstance(many, tuple)
        assert len(few) == 2 and len(set(many)) == 5 and many[:2] == few
    draws = [
        scale
        for step in range(50)
        for scales in rope_scales((0.5, 2.0), 3, step, 10)
        if isinstance(scales, tuple)
        for scale in scales
    ]
    assert len(draws) == 1000 and min(draws) >= 0.5 and max(draws) <= 2.0
    assert abs(sum(map(math.log, draws)) / len(draws)) < 0.05  # standard error 0.013
    assert rope_scales(None, 3, 7, 5) == (1.0, 1.0)


def test_objective_ramp__goes_along_half_a_cosine_and_never_leaves_a_term_out() -> None:
    first, last = Objective(1.0, 1.0, 0.1, 1.0), Objective(1.0, 1.0, 0.1, 0.5, gram=2.0)
    ramp = ObjectiveRamp(first, range(100, 110))
    found = [ramp.at(step, last) for step in range(100, 112)]
    assert [each.gram for each in found] == pytest.approx(
        [1.0 - math.cos(math.pi * done / 10) for done in range(1, 11)] + [2.0] * 2
    )
    assert all(each.gram > 0.0 and (each.dino, each.koleo) == (1.0, 0.1) for each in found)
    assert found[4].local == pytest.approx(0.75) and found[9:] == [last] * 3
