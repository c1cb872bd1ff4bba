"""The balanced draw: quotas, recursion, leaves, repeats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.curation.balance import cluster_paths, evenness, largest_quota, quotas, sample_balanced

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=12).map(np.array)


@given(SIZES, st.integers(0, 700))
def test_quota__is_the_largest_within_the_budget(sizes: np.ndarray, budget: int) -> None:
    quota = largest_quota(sizes, budget)
    assert np.minimum(sizes, quota).sum() <= budget
    assert quota == sizes.max() or np.minimum(sizes, quota + 1).sum() > budget


@given(SIZES, st.integers(0, 700))
def test_quotas__use_the_budget_and_differ_by_one_where_there_is_more(
    sizes: np.ndarray, budget: int
) -> None:
    given_out = quotas(sizes, budget, np.random.default_rng(0))
    assert given_out.sum() == min(budget, sizes.sum())
    assert (given_out <= sizes).all()
    limited = given_out[given_out < sizes]
    assert limited.size == 0 or given_out.max() <= limited.min() + 1


def two_levels() -> list[np.ndarray]:
    """1,000 images in clusters of 900, 60, 30 and 10; the first two are one branch, the others another."""
    return [
        np.repeat(np.arange(4, dtype=np.int32), [900, 60, 30, 10]),
        np.array([0, 0, 1, 1], dtype=np.int32),
    ]


def test_draw__is_even_at_every_level() -> None:
    taken = sample_balanced(two_levels(), 80, seed=0)
    assert taken.max() == 1
    assert np.bincount(two_levels()[0], weights=taken).tolist() == [20, 20, 30, 10]


@settings(max_examples=20)
@given(st.integers(1, 1_000), st.integers(0, 5))
def test_draw__takes_as_many_as_asked_for(target: int, seed: int) -> None:
    taken = sample_balanced(two_levels(), target, seed=seed)
    assert taken.sum() == target
    assert np.array_equal(taken, sample_balanced(two_levels(), target, seed=seed))


def test_seeds__draw_other_images() -> None:
    first, second = (sample_balanced(two_levels(), 80, seed=seed) for seed in (0, 1))
    assert (first != second).any()


def test_closest_leaves__are_those_near_their_centroid() -> None:
    distances = np.random.default_rng(0).permutation(1_000).astype(np.float32)
    taken = sample_balanced(two_levels(), 8, seed=0, leaves="closest", distances=distances)
    nearest = np.argsort(distances[:900])[: int(taken[:900].sum())]
    assert sorted(np.flatnonzero(taken[:900])) == sorted(nearest)


@pytest.mark.parametrize(("repeats", "most"), [(1, 10), (4, 40)])
def test_repeats__let_a_small_branch_give_more(repeats: int, most: int) -> None:
    taken = sample_balanced(two_levels(), 200, seed=0, repeats=repeats)
    assert taken.sum() == 200
    assert taken[990:].sum() == most
    assert taken.max() <= repeats


def test_paths__follow_parents_upward() -> None:
    assert cluster_paths(two_levels())[:, [0, 950, 995]].tolist() == [[0, 1, 3], [0, 0, 1]]


def test_evenness__is_one_for_equal_shares_and_zero_for_one_class() -> None:
    assert evenness(np.arange(8), 8) == pytest.approx(1.0)
    assert evenness(np.zeros(8), 8) == 0.0
