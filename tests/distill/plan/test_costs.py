"""Costs that were measured come before those that FLOPs give: read, refused, and what a plan makes of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import PlanError
from distill.plan.costs import Costs, read_costs
from distill.plan.flops import DEFAULT_DEVICE
from distill.plan.from_recipe import TeacherShape, plan_family
from distill.plan.plan import Plan, timed_by
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job

# Seconds that an H100 is estimated to take per image: small networks reach a small part of its peak
UNLIKE_FLOPS = {
    "vits16": 0.0036,
    "vits16plus": 0.0038,
    "vitb16": 0.0037,
    "vitl16": 0.0078,
    "vith16plus": 0.0158,
}
TEACH_S = 0.0182


def family() -> tuple[FamilyRecipe, TeacherShape]:
    recipe, teacher = load_job("family_vit", [])
    assert isinstance(recipe, FamilyRecipe)
    return recipe, teacher_shape(recipe, teacher, has_files=False)


def planned(num_ranks: int, costs: Costs | None) -> Plan:
    return plan_family(*family(), num_ranks, replace(DEFAULT_DEVICE, costs=costs))


@pytest.mark.parametrize("num_ranks", [8, 64, 256])
def test_plan__costs_unlike_flops_fill_all_ranks(num_ranks: int) -> None:
    costs = Costs(TEACH_S, UNLIKE_FLOPS, "a test")
    plan = planned(num_ranks, costs)
    least_s = plan.images_global * (TEACH_S + sum(UNLIKE_FLOPS.values())) / num_ranks
    assert least_s * (1 - 1e-9) <= plan.step_s <= 1.05 * least_s
    by_flops = planned(num_ranks, None)
    timed = timed_by(by_flops, TEACH_S, list(UNLIKE_FLOPS.values()))
    assert timed.placements == by_flops.placements
    assert max(timed.student_s) > 1.05 * plan.step_s or num_ranks == 8


def test_plan__a_plan_as_costs_gives_the_same_plan(tmp_path: Path) -> None:
    plan = planned(64, None)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert planned(64, read_costs(path)).to_json() == plan.to_json()


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "{",
        {"teach_s": 1.0},
        {"teach_s": 1.0, "image_s": {}},
        {"teach_s": 0, "image_s": {"a": 1.0}},
        {"teach_s": 1.0, "image_s": {"a": "fast"}},
        {"teach_s": 1.0, "image_s": {"a": float("inf")}},
    ],
)
def test_read_costs__refuses_other_files(tmp_path: Path, facts: Any) -> None:
    path = tmp_path / "costs.json"
    path.write_text(facts if isinstance(facts, str) else json.dumps(facts))
    with pytest.raises(PlanError, match="--costs") as caught:
        read_costs(path)
    assert "distill bench" in str(caught.value.fix)


def test_read_costs__a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        read_costs(tmp_path / "none.json")


def test_plan__a_student_without_seconds_is_named() -> None:
    with pytest.raises(PlanError, match=r"no seconds for students\.vits16plus, only for vits16"):
        planned(8, Costs(TEACH_S, {"vits16": 0.1}, "costs.json"))
