"""Plans that change at steps."""

from distill.plan.by_step import Timetable
from distill.plan.placement import Work
from distill.plan.plan import make_plan, rebalanced, without


def test_timetable__the_newest_plan_that_has_begun_is_in_force() -> None:
    first, second, third = (make_plan([Work("a", 1.0)], 1.0, n, 1) for n in (8, 9, 10))
    timetable = Timetable(first)
    timetable.change(5, second)
    assert (timetable.at(4), timetable.at(5)) == (first, second)
    timetable.change(9, third)
    assert (timetable.at(8), timetable.at(9)) == (second, third)


def test_timetable__a_network_that_finishes_is_known_from_the_start() -> None:
    plan = make_plan([Work("a", 3.0, 1), Work("b", 1.0, 1)], 1.0, 32, 2, lookahead=1)
    timetable = Timetable(plan, [(100, without(plan, {"a"}))])
    assert [len(timetable.at(step).placements) for step in (0, 99, 100)] == [2, 2, 1]
    assert timetable.most_images(0) == 32 > plan.largest_shares[0]
    assert not timetable.has_same_networks(99, 100)
    timetable.change(40, rebalanced(plan, [2.0, 1.0], plan.student_s))
    assert [len(timetable.at(step).placements) for step in (39, 40, 99, 100)] == [2, 2, 2, 1]
