"""Shares that follow measured speeds, on real gloo groups with clocks that are set by hand."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.plan.costs import Costs
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from distill.train.balance import BalanceListener, Balancer
from distill.train.by_step import PlanSchedule
from distill.train.groups import make_groups
from distill.train.student import Stopwatch
from tests.support.spawn import on_ranks

WORKS = [
    NetworkCost(name, 1 / 3) for name in "abc"
]  # 100 s of training per rank and step, 300 of teaching


class Clock(Stopwatch):
    """Says what the test wants."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.seconds = 0.0

    def read_s(self) -> float:
        return self.seconds


class Room:
    max_images = 0

    def make_room(self, max_images: int) -> None:
        self.max_images = max_images


def shares_with_a_slow_rank(slow: int, factor: float) -> dict[str, Any]:
    rank, lookahead = dist.get_rank(), 2
    plan = make_plan(WORKS, 1.0, 300, dist.get_world_size(), PlanOptions(lookahead=lookahead))
    groups = make_groups(plan, timedelta(seconds=60))
    plan_schedule, teaching, training, room = PlanSchedule(plan), Clock(), Clock(), Room()
    told: list[str] = []
    costs: list[Costs] = []
    balancer = Balancer(
        plan_schedule,
        groups.control,
        room,
        (teaching, {plan.placements[rank].name: training}),
        lookahead=lookahead,
        every=10,
        listener=BalanceListener(told.append, costs.append),
    )
    pace = factor if rank == slow else 1.0
    for step in range(1, 42):
        images = len(plan_schedule.at(step).share(rank, step))
        teaching.units += images
        teaching.seconds += pace * images
        training.seconds += pace * plan.student_s[rank]
        balancer.after_step(step)
    return {
        "early": [len(share) for share in plan_schedule.at(12).shares(12)],
        "late": plan_schedule.at(41).exact_shares,
        "told": told,
        "costs": [(each.teach_s, dict(each.image_s)) for each in costs],
        "room": room.max_images,
    }


def test_balancer__a_slow_rank_teaches_less_and_is_named_once() -> None:
    results = on_ranks(3, shares_with_a_slow_rank, 1, 1.5)
    late = results[0]["late"]
    assert all(result["late"] == late for result in results)  # the same plan on every rank
    assert late[1] < 100 < min(late[0], late[2])
    loads = [100 + late[0], 1.5 * (100 + late[1]), 100 + late[2]]
    assert max(loads) - min(loads) < 0.01 * max(loads)
    assert results[0]["room"] >= late[0]
    for result in results:
        (line,) = result["told"]
        assert line == "step 11: rank 1 takes 1.50x the usual time per image; it will teach less"


def test_balancer__of_two_ranks_the_slow_one_is_named() -> None:
    for result in on_ranks(2, shares_with_a_slow_rank, 1, 1.3):
        (line,) = result["told"]
        assert line == "step 11: rank 1 takes 1.30x the usual time per image; it will teach less"


def test_balancer__leaves_equal_ranks_alone() -> None:
    results = on_ranks(3, shares_with_a_slow_rank, 1, 1.0)
    assert all(result["late"] == (100.0, 100.0, 100.0) for result in results)
    assert all(not result["told"] and not result["room"] for result in results)


def test_balancer__hands_on_what_the_networks_cost_once_and_alike() -> None:
    results = on_ranks(3, shares_with_a_slow_rank, 1, 1.5)
    (measured,) = results[0]["costs"]
    teach_s, image_s = measured
    # 300 images of 1 s over three ranks, one of which takes half as long again for its 100
    assert teach_s == pytest.approx((100 + 150 + 100) / 300, rel=0.02)
    assert image_s == pytest.approx({"a": 1 / 3, "b": 1.5 / 3, "c": 1 / 3}, rel=0.02)
    assert all(result["costs"] == [measured] for result in results)
