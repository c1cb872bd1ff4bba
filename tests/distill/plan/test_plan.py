import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import PlanError
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan, rebalanced, without
from distill.plan.shares import LEAST_SHARE, split_evenly
from teacher.shapes import KOLEO_GROUP

costs = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    costs=costs,
    teaching=st.floats(0.01, 10.0),
    images=st.integers(16, 2048),
    num_ranks=st.integers(1, 40),
    lookahead=st.integers(0, 2),
    unit=st.sampled_from([1, 2, 16]),
    has_even_shares=st.booleans(),
    step=st.integers(0, 10**9),
)
def test_make_plan__every_image_is_taught_once_and_trained_on_by_every_student(
    costs: list[float],
    teaching: float,
    images: int,
    num_ranks: int,
    lookahead: int,
    unit: int,
    has_even_shares: bool,
    step: int,
) -> None:
    num_ranks = min(num_ranks, images)
    works = [NetworkCost(f"s{i}", cost) for i, cost in enumerate(costs)]
    try:
        plan = make_plan(
            works,
            teaching,
            images,
            num_ranks,
            PlanOptions(lookahead=lookahead, unit=unit, has_even_shares=has_even_shares),
        )
    except PlanError:
        assert num_ranks > images - len(costs)  # one student may end up with more ranks than images
        return
    shares = plan.shares(step)
    assert [i for share in shares for i in share] == list(range(images))
    assert all(len(share) <= most for share, most in zip(shares, plan.largest_shares, strict=True))
    assert sum(plan.mean_shares) == pytest.approx(images)
    for placement in plan.placements:
        assert [i for part in placement.slices for i in part] == list(range(images))
        assert placement.world_ranks.stop <= num_ranks
        assert all(len(part) for part in placement.slices)
    for rank in range(num_ranks):
        hosted = {i for p in plan.placements if rank in p.world_ranks for i in p.slice_of(rank)}
        assert {i for part in plan.required_positions[rank] for i in part} == hosted
    # never worse than even shares, up to one unit of rounding where every step, or a group, is rounded alike
    slack = teaching * max(unit, 1)
    assert plan.step_s <= (max(plan.even_load_s) + slack) * (1 + 1e-9)
    assert plan.gain <= plan.gain_bound * (1 + 1e-9)


def test_rebalanced__a_slow_rank_teaches_less_and_nobody_stops() -> None:
    works = [NetworkCost(f"n{each}", each) for each in (1.0, 0.9, 1.1, 1.3, 0.8)]
    plan = make_plan(works, 1.7, 100, 5, PlanOptions(lookahead=1))  # no groups that meet
    slow = [1.7, 1.7, 1.7 * 1.5, 1.7, 1.7]
    changed = rebalanced(plan, slow, plan.student_s)
    assert sum(changed.exact_shares) == pytest.approx(100)
    assert changed.exact_shares[2] < plan.exact_shares[2]
    busy = [s + c * n for s, c, n in zip(plan.student_s, slow, changed.exact_shares, strict=True)]
    assert max(busy) == pytest.approx(min(busy))
    stuck = rebalanced(plan, plan.student_s, [*plan.student_s[:4], 1e6])
    assert 0 < stuck.exact_shares[4] <= LEAST_SHARE
    assert rebalanced(make_plan([NetworkCost("a", 1.0)], 1.0, 8, 2), [9.0, 1.0], [0.0, 0.0]).shares(
        0
    ) == (
        range(4),
        range(4, 8),
    )


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.floats(0.01, 10.0), min_size=2, max_size=6),
    num_ranks=st.integers(1, 12),
    lookahead=st.integers(0, 2),
    step=st.integers(0, 10**6),
)
def test_without__the_others_stay_and_teaching_fills_the_gap(
    costs: list[float], num_ranks: int, lookahead: int, step: int
) -> None:
    works = [NetworkCost(f"n{index}", cost) for index, cost in enumerate(costs)]
    plan = make_plan(works, 1.0, 96, num_ranks, PlanOptions(lookahead=lookahead))
    changed = without(plan, {"n0"})
    assert changed.placements == plan.placements[1:]
    assert [i for share in changed.shares(step) for i in share] == list(range(96))
    assert changed.step_s <= plan.step_s * (1 + 1e-9) + 1.0  # an image's rounding in a group
    if changed.is_dithered:
        teaching = [
            load for load, own in zip(changed.load_s, changed.student_s, strict=True) if load > own
        ]
        assert max(teaching) - min(teaching) <= 1.0 + 1e-9  # an image: a group is rounded alike
        assert max(changed.student_s) <= max(teaching) * (1 + 1e-9) or changed.step_s == max(
            changed.student_s
        )


def test_shares__over_many_steps_are_the_exact_ones() -> None:
    plan = make_plan(
        [NetworkCost("a", 3.0), NetworkCost("b", 1.3)], 1.7, 100, 5, PlanOptions(lookahead=1)
    )
    steps = 1000
    taught = np.zeros(5)
    for step in range(steps):
        sizes = [len(share) for share in plan.shares(step)]
        taught += sizes
        gaps = [abs(size - exact) for size, exact in zip(sizes, plan.exact_shares, strict=True)]
        assert max(gaps) < 1.0
    assert taught / steps == pytest.approx(np.array(plan.exact_shares), abs=0.01)


PUBLISHED = {"s": 0.18, "sp": 0.22, "b": 0.55, "l": 1.83, "hp": 4.93}  # TF per image, METHOD 5


def test_make_plan__eight_ranks_are_balanced_and_full() -> None:
    """S S+ B L H+ on 1 1 1 2 3: 73% with even shares, 100% filled (teacher 7.10 TF per image pair)."""
    plan = make_plan(
        [NetworkCost(*each) for each in PUBLISHED.items()], 7.10, 1920, 8, PlanOptions(lookahead=2)
    )
    assert {p.name: len(p.slices) for p in plan.placements} == {
        "s": 1,
        "sp": 1,
        "b": 1,
        "l": 2,
        "hp": 3,
    }
    assert plan.utilisation_even_barrier == pytest.approx(0.73, abs=0.01)
    assert plan.utilisation > 0.997  # an image of 240, by which a group's ranks do not differ
    assert plan.gain == pytest.approx(2.92, abs=0.01)
    assert plan.gain_bound == pytest.approx(2.92, abs=0.01)


def test_make_plan__the_published_launch() -> None:
    """S S+ B L on 48 48 80 120 of 296 ranks: 85.1% with even shares, 97.7% in full images."""
    ranks = {"s": 48, "sp": 48, "b": 80, "l": 120}
    works = [NetworkCost(name, PUBLISHED[name], count) for name, count in ranks.items()]
    plan = make_plan(works, 7.10, 1920, 296, PlanOptions(lookahead=2))
    assert plan.utilisation_even_barrier == pytest.approx(0.851, abs=0.001)
    assert plan.utilisation == pytest.approx(0.977, abs=0.001)
    assert {len(share) for share in plan.shares(3)} == {5, 7, 8}
    assert plan.shares(3) == plan.shares(4)  # no group waits for ranks that teach one more
    # with a barrier every step an image is an image: one more or less per rank is 11% of its step
    assert make_plan(works, 7.10, 1920, 296).utilisation > 0.97


def test_make_plan__thousands_of_ranks_are_planned_in_no_time() -> None:
    works = [NetworkCost(f"s{i}", 0.2 * (i + 1)) for i in range(9)]
    plan = make_plan(works, 7.10, 8192, 4096, PlanOptions(lookahead=2))
    assert plan.utilisation > 0.94  # two images a rank, of which a group has one more or less
    assert len(plan.shares(7)) == 4096


def test_make_plan__one_network_on_all_ranks_is_local() -> None:
    assert make_plan([NetworkCost("a", 3.0, 3)], 1.0, 64, 3).is_local
    assert not make_plan([NetworkCost("a", 3.0), NetworkCost("b", 1.0)], 1.0, 64, 2).is_local


def test_split_evenly__respects_koleo_groups_where_they_divide() -> None:
    assert [len(p) for p in split_evenly(128, 4)] == [32] * 4
    assert all(p.start % KOLEO_GROUP == 0 for p in split_evenly(128, 4))
    assert sorted(len(p) for p in split_evenly(64, 3)) == [21, 21, 22]


@pytest.mark.parametrize(
    ("works", "images", "num_ranks", "message"),
    [
        ([NetworkCost("a", 1.0)], 8, 0, "0 ranks: at least one is needed"),
        ([NetworkCost("a", 1.0, 4)], 8, 2, "students.a.ranks = 4: this job has 2 ranks"),
        ([NetworkCost("a", 1.0)], 2, 4, "a: 4 ranks for a batch of 2 images"),
    ],
)
def test_make_plan__refuses_what_cannot_work(
    works: list[NetworkCost], images: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(works, 1.0, images, num_ranks)
