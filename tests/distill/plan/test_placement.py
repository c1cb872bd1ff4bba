"""Who trains where: as well as trying everything, within nodes, or as the recipe says."""

import re
from itertools import accumulate, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import PlanError
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from teacher.shapes import KOLEO_GROUP


@settings(max_examples=25, deadline=None)
@given(costs=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=3), num_ranks=st.integers(1, 5))
def test_make_plan__places_as_well_as_trying_everything(costs: list[float], num_ranks: int) -> None:
    assert_placed_as_well_as_can_be(costs, num_ranks)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4), num_ranks=st.integers(1, 7))
def test_make_plan__places_larger_families_as_well(costs: list[float], num_ranks: int) -> None:
    assert_placed_as_well_as_can_be(costs, num_ranks)


def assert_placed_as_well_as_can_be(costs: list[float], num_ranks: int) -> None:
    """The step is as short as with the best of all contiguous placements, overlapping ones included."""
    images, teaching = 840, 0.3  # divisible by every number of ranks tried
    works = [NetworkCost(f"s{i}", cost) for i, cost in enumerate(costs)]
    plan = make_plan(works, teaching, images, num_ranks, PlanOptions(lookahead=1))
    spans = [(n, first) for n in range(1, num_ranks + 1) for first in range(num_ranks - n + 1)]
    of_span = np.zeros((len(spans), num_ranks))  # the load of one image's cost
    for row, (count, first) in zip(of_span, spans, strict=True):
        row[first : first + count] = images / count
    loads = np.zeros((1, num_ranks))  # of every choice of spans for the networks so far
    for cost in costs:
        loads = (loads[:, None] + cost * of_span).reshape(-1, num_ranks)
    ideal = images * (sum(costs) + teaching) / num_ranks
    best = max(loads.max(axis=1).min(), ideal)
    assert best * (1 - 1e-9) <= plan.step_s <= best * 1.016  # NEARLY, and rounded to hundredths


def test_make_plan__a_network_too_heavy_for_its_ranks_shares_those_of_others() -> None:
    works = [NetworkCost("heavy", 9.0), *(NetworkCost(f"s{i}", 0.2) for i in range(5))]
    plan = make_plan(works, 1.0, 960, 6, PlanOptions(lookahead=2))
    assert plan.utilisation > 0.98
    assert len(plan.placements[0].slices) > 4
    published = make_plan(works, 1.0, 960, 6, PlanOptions(has_even_shares=True))
    assert [len(p.slices) for p in published.placements] == [1] * 6


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_make_plan__groups_that_fill_nodes_do_not_cross_them(counts: list[int]) -> None:
    works = [NetworkCost(f"s{i}", 1.0, count) for i, count in enumerate(counts)]
    plan = make_plan(works, 1.0, 1000, sum(counts), PlanOptions(ranks_per_node=8))
    assert sorted(r for p in plan.placements for r in p.world_ranks) == list(range(sum(counts)))

    def borders(first: int, count: int) -> int:
        return (first + count - 1) // 8 - first // 8

    in_order = list(accumulate([0, *counts]))
    crossed = sum(borders(p.first_rank, len(p.slices)) for p in plan.placements)
    assert crossed <= sum(borders(first, n) for first, n in zip(in_order, counts, strict=False))


def test_make_plan__fewer_ranks_than_students_share_ranks() -> None:
    plan = make_plan(
        [NetworkCost("a", 3.0), NetworkCost("b", 2.0), NetworkCost("c", 1.0)], 1.0, 64, 2
    )
    assert {p.name: list(p.world_ranks) for p in plan.placements} == {"a": [0], "b": [1], "c": [1]}
    assert plan.notes == ("3 networks on 2 ranks: some ranks hold several",)


def test_make_plan__ranks_as_the_recipe_says_them() -> None:
    """Groups may share ranks, and ranks may be left over; what is not trained on is taught on."""
    works = [NetworkCost("a", 3.0, range(3)), NetworkCost("b", 1.0, range(2, 4))]
    plan = make_plan(works, 1.0, 96, 6, PlanOptions(lookahead=2))
    assert {p.name: p.world_ranks for p in plan.placements} == {"a": range(3), "b": range(2, 4)}
    assert plan.notes == ("2 ranks only teach", "1 ranks hold several students")
    assert plan.mean_shares[2] == 0 < min(plan.mean_shares[4:])
    assert sum(plan.mean_shares) == pytest.approx(96)


@pytest.mark.parametrize(
    ("ranks", "fix"),
    [
        (range(2, 6), r"Write 0-3 or `ranks: auto`, or start 6"),
        (range(9, 12), r"Write 1-3 or .* 12 "),
    ],
)
def test_make_plan__ranks_that_this_job_has_not(ranks: range, fix: str) -> None:
    works = [NetworkCost("a", 1.0, range(2)), NetworkCost("b", 1.0, ranks)]
    told = rf"students\.b\.ranks = {ranks.start}-{ranks.stop - 1}: this job has ranks 0-3"
    with pytest.raises(PlanError, match=told) as caught:
        make_plan(works, 1.0, 96, 4)
    assert re.match(fix, caught.value.fix)


@settings(max_examples=15, deadline=None)
@given(
    costs=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=3),
    num_ranks=st.integers(3, 10),
    groups=st.integers(24, 40),
)
def test_make_plan__coarse_slices_get_no_rank_that_shortens_nothing(
    costs: list[float], num_ranks: int, groups: int
) -> None:
    """Slices of full KoLeo groups: as short a step as with the best of all divisions side by side."""
    images, teaching = KOLEO_GROUP * groups, 1.0
    works = [NetworkCost(f"s{i}", cost) for i, cost in enumerate(costs)]
    options = PlanOptions(lookahead=1, has_full_groups=True)
    plan = make_plan(works, teaching, images, num_ranks, options)
    ideal = images * (sum(costs) + teaching) / num_ranks
    divisions = product(range(1, num_ranks + 1), repeat=len(costs))
    best = min(
        max(cost * KOLEO_GROUP * -(-groups // n) for cost, n in zip(costs, counts, strict=True))
        for counts in divisions
        if sum(counts) <= num_ranks
    )
    assert plan.step_s <= max(best, ideal) * 1.016  # NEARLY, and rounded to hundredths
