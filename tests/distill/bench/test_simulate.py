"""Days of a job: all time is accounted for, and what is lost is what arithmetic gives."""

import math

import pytest

from distill.bench.simulate import (
    BLOCK,
    Assumptions,
    Chances,
    Rhythm,
    Saving,
    best_distance,
    live,
    ways_of_saving,
)
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job

RHYTHM = Rhythm(mean_s=0.5 * BLOCK, deviation_s=0.2)
DISK = Saving("on disk", every=600, stall_s=2.0, lag_s=20.0)
DOWN = (15.0, 60.0)


def chances(days: float, seed: int = 0) -> Chances:
    return Chances(0.02, 1.0, days, seed)


def test_live__without_failures_only_saves_cost() -> None:
    life = live(RHYTHM, DISK, 1e15, DOWN, chances(30))
    assert life.failures == 0 and life.lost_s == life.down_s == 0
    assert life.goodput == pytest.approx(300 / 302, rel=1e-4)


def test_live__all_time_goes_somewhere() -> None:
    life = live(RHYTHM, DISK, 3_600.0, DOWN, chances(30))
    assert life.trained_s + life.stalled_s + life.lost_s + life.down_s == pytest.approx(life.wall_s)
    assert life.failures > 500 and min(life.stalled_s, life.lost_s, life.down_s) > 0


@pytest.mark.parametrize("mtbf_s", [3_600.0, 7_200.0])
def test_live__loses_half_a_distance_the_save_and_the_restart(mtbf_s: float) -> None:
    """To first order, over a year, which has thousands of failures."""
    life = live(RHYTHM, DISK, mtbf_s, DOWN, chances(365))
    per_failure_s = (life.lost_s + life.down_s) / life.failures
    expected_s = 302 / 2 + DISK.lag_s + sum(DOWN)
    assert per_failure_s == pytest.approx(expected_s, rel=0.05)
    assert life.failures == pytest.approx(life.wall_s / (mtbf_s + sum(DOWN)), rel=0.05)


def test_live__every_way_of_saving_meets_the_same_failures() -> None:
    near = Saving("in memory", every=60, stall_s=0.1, lag_s=1.0)
    lives = [live(RHYTHM, way, 7_200.0, DOWN, chances(30)) for way in (DISK, near)]
    assert lives[0].failures == lives[1].failures
    assert lives[0].down_s == lives[1].down_s
    assert lives[0].goodput < lives[1].goodput
    assert live(RHYTHM, DISK, 7_200.0, DOWN, chances(30)) == lives[0]
    assert live(RHYTHM, DISK, 7_200.0, DOWN, chances(30, seed=1)) != lives[0]


def test_best_distance__is_about_youngs() -> None:
    best = best_distance(RHYTHM, DISK, 7_200.0, DOWN, chances(30))
    assert best["young_s"] == pytest.approx(math.sqrt(2 * 2.0 * 7_200))
    assert 0.5 < best["every_s"] / best["young_s"] < 2
    worse = live(RHYTHM, DISK, 7_200.0, DOWN, chances(30, seed=1))
    assert best["goodput"] > worse.goodput


def test_ways_of_saving__take_the_distances_of_the_recipe_and_of_the_copies() -> None:
    family, _ = load_job("family_vit", ["checkpoint.peer_every=100", "checkpoint.every=10min"])
    assert isinstance(family, FamilyRecipe)
    copies, disk = ways_of_saving(family, 0.5, 6.8, Assumptions())
    assert copies.stall_s == pytest.approx(1.0) and copies.lag_s == pytest.approx(1.0 + 3.4)
    assert copies.every == 100 - 9  # less the steps until a copy is complete
    assert disk.every == 1200 and disk.lag_s == pytest.approx(1.0 + 6.8)
