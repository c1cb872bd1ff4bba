"""Plans that change at steps."""

from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan, rebalanced, without
from distill.train.by_step import PlanSchedule


def test_timetable__the_newest_plan_that_has_begun_is_in_force() -> None:
    first, second, third = (make_plan([NetworkCost("a", 1.0)], 1.0, n, 1) for n in (8, 9, 10))
    plan_schedule = PlanSchedule(first)
    plan_schedule.change(5, second)
    assert (plan_schedule.at(4), plan_schedule.at(5)) == (first, second)
    plan_schedule.change(9, third)
    assert (plan_schedule.at(8), plan_schedule.at(9)) == (second, third)


def test_timetable__a_network_that_finishes_is_known_from_the_start() -> None:
    plan = make_plan(
        [NetworkCost("a", 3.0, 1), NetworkCost("b", 1.0, 1)], 1.0, 32, 2, PlanOptions(lookahead=1)
    )
    plan_schedule = PlanSchedule(plan, [(100, without(plan, {"a"}))])
    assert [len(plan_schedule.at(step).placements) for step in (0, 99, 100)] == [2, 2, 1]
    assert plan_schedule.most_images(0) == 32 > plan.largest_shares[0]
    assert not plan_schedule.has_same_networks(99, 100)
    plan_schedule.change(40, rebalanced(plan, [2.0, 1.0], plan.student_s))
    assert [len(plan_schedule.at(step).placements) for step in (39, 40, 99, 100)] == [2, 2, 2, 1]
