"""A run that measured what its networks cost places them so at its next start, with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distill.plan.costs import Costs
from distill.plan.flops import DEFAULT_DEVICE
from distill.plan.from_recipe import plan_family
from distill.train.placing import FILE, agreed_costs, place_family, write_costs
from tests.distill.plan.test_costs import TEACH_S, UNLIKE_FLOPS, family
from tests.support.jobs import (
    RUN,
    run_and_interrupt,
    run_distill,
    status_of,
    students_of,
    write_recipes,
)
from tests.support.spawn import on_ranks


def test_place_family__by_costs_where_a_step_becomes_shorter() -> None:
    recipe, shape = family()
    costs = Costs(TEACH_S, UNLIKE_FLOPS, "a test")
    placed, _, note = place_family(recipe, shape, 64, DEFAULT_DEVICE, costs)
    assert len(placed.placements[0].slices) > 2
    assert "vits16 7 (2 by FLOPs)" in note and "% shorter" in note


def test_place_family__by_flops_where_costs_are_like_them_or_absent() -> None:
    recipe, shape = family()
    plan = plan_family(recipe, shape, 64)
    like = Costs(plan.teach_s, dict(zip(UNLIKE_FLOPS, plan.image_s, strict=True)), "a test")
    for costs in (like, None):
        placed, _, note = place_family(recipe, shape, 64, DEFAULT_DEVICE, costs)
        assert placed.to_json() == plan.to_json() and not note


def agree(folder: str) -> list[Any]:
    """What a rank takes where only rank 0 sees the file."""
    path = Path(folder if dist.get_rank() == 0 else "/nowhere")
    agreed = [agreed_costs(path, labels, dist.group.WORLD) for labels in (["b", "a"], ["a", "new"])]
    return [None if each is None else (each.teach_s, dict(each.image_s)) for each in agreed]


def test_agreed_costs__are_those_of_rank_0(tmp_path: Path) -> None:
    write_costs(tmp_path, 1, Costs(9.0, {"a": 9.0, "b": 9.0}, ""))
    assert not (tmp_path / FILE).exists()
    write_costs(tmp_path, 0, Costs(1.0, {"a": 2.0, "b": 3.0}, ""))
    assert on_ranks(2, agree, str(tmp_path)) == [[(1.0, {"b": 3.0, "a": 2.0}), None]] * 2


def assert_close_students(one: Path, other: Path) -> None:
    """The same to rounding, which 60 steps of Adam enlarge: gradients are added in another order."""
    for name, weights in students_of(one).items():
        for key, tensor in students_of(other)[name].items():
            apart = (weights[key] - tensor).norm() / weights[key].norm().clamp_min(1.0)
            assert apart < 0.01, f"{name} {key}: {apart}"


@pytest.mark.slow
def test_train__the_next_start_places_by_what_this_one_measured(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=10, steps=40, save_every=8)
    words = ["engine.balance=4", "engine.processes=3", "engine.placed_by=measured"]
    first = run_distill("train", str(recipe), "--out", str(tmp_path / "out"), *words)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "out" / RUN
    measured = json.loads((run / FILE).read_text())
    assert measured["teach_s"] > 0 and min(measured["image_s"].values()) > 0
    # a second run, stopped in the family, finds costs at its next start that are far from FLOPs
    other = tmp_path / "other" / RUN
    command = ["train", str(recipe), "--out", str(tmp_path / "other"), *words]
    run_and_interrupt(command, other / "status.json", "family")
    assert status_of(other)["state"] == "stopped"
    labels = list(measured["image_s"])
    costs = {"teach_s": 0.001, "image_s": dict.fromkeys(labels, 0.001) | {labels[-1]: 1.0}}
    (other / FILE).write_text(json.dumps(costs))
    again = run_distill(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "by FLOPs" in (other / "events.jsonl").read_text()
    before, after = (json.loads((r / "plan.json").read_text())["placements"] for r in (run, other))
    assert before != after
    assert_close_students(run, other)
