"""Shares that fill the gaps: level, and as good as any division."""

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.plan.shares import fill_exactly, fill_shares, fill_units


@settings(max_examples=100, deadline=None)
@given(
    load=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=4),
    cost=st.floats(0.1, 10.0),
    images=st.integers(1, 9),
)
def test_fill_whole__is_the_best_division_there_is(
    load: list[float], cost: float, images: int
) -> None:
    def largest(sizes: Sequence[int]) -> float:
        # a rank that teaches nothing does not lengthen the step by more than its students
        return max(own + cost * size for own, size in zip(load, sizes, strict=True))

    sizes = fill_units(load, [cost] * len(load), images, 1)
    assert sum(sizes) == images and min(sizes) >= 0
    divisions = (d for d in product(range(images + 1), repeat=len(load)) if sum(d) == images)
    assert largest(sizes) == pytest.approx(min(map(largest, divisions)))


@settings(max_examples=200, deadline=None)
@given(
    load=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=12),
    cost=st.floats(0.1, 10.0),
    images=st.integers(1, 500),
)
def test_fill_exactly__is_level(load: list[float], cost: float, images: int) -> None:
    costs = [cost * (1 + i % 3) for i in range(len(load))]  # ranks of three speeds
    shares = fill_exactly(load, costs, images)
    assert sum(shares) == pytest.approx(images)
    busy = [own + c * share for own, c, share in zip(load, costs, shares, strict=True)]
    level = max(b for b, share in zip(busy, shares, strict=True) if share > 0)
    assert all(b == pytest.approx(level) for b, share in zip(busy, shares, strict=True) if share)
    assert all(
        own >= level * (1 - 1e-9) for own, share in zip(load, shares, strict=True) if not share
    )


def test_fill_shares__a_group_that_meets_gets_full_units_where_that_is_shorter() -> None:
    """By exact shares some rank of each group teaches one more in every step, and all of the group wait for it."""
    student_s, teach_s = [2.0] * 5 + [1.2] * 5, [1.0] * 10
    alone = [range(rank, rank + 1) for rank in range(10)]
    exact = fill_shares(student_s, teach_s, 75, 1, alone)
    assert exact == pytest.approx([7.1] * 5 + [7.9] * 5)
    steady = fill_shares(student_s, teach_s, 75, 1, [range(5), range(5, 10)])
    assert (
        steady == [7.0] * 5 + [8.0] * 5
    )  # 9.0 and 9.2 s a step, where exact ones take 10.0 and 9.2
    slow = fill_shares(student_s, [2.0, *teach_s[1:]], 75, 1, [range(5), range(5, 10)])
    assert sum(slow) == 75 and slow[0] < 5 <= min(slow[1:])
