import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.data.sampler import CYCLE, Interleave, Pool, Sampler, permute
from distill.data.stateless_random import hashes, uniforms


def stream(pools: list[Pool], seed: int, batch: int, num_steps: int) -> NDArray[np.int64]:
    """Sample ids of some steps, [steps, batch]."""
    sampler = Sampler(pools, seed, [(0, batch)])
    return np.stack([sampler.ids(step, np.arange(batch)) for step in range(num_steps)])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), samples=st.integers(1, 60), batch=st.integers(1, 40))
def test_sampler__every_epoch_is_a_permutation(seed: int, samples: int, batch: int) -> None:
    ids = stream([Pool(0, samples)], seed, batch, -(-3 * samples // batch)).ravel()
    for epoch in range(3):
        assert sorted(ids[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_sampler__any_part_of_a_batch_alone() -> None:
    sampler = Sampler([Pool(0, 50)], 3, [(0, 32)])
    whole = sampler.ids(7, np.arange(32))
    assert np.array_equal(sampler.ids(7, np.arange(10, 20)), whole[10:20])
    assert not np.array_equal(whole, Sampler([Pool(0, 50)], 4, [(0, 32)]).ids(7, np.arange(32)))


def test_permute__all_orders_are_as_likely() -> None:
    """Chi-squared over the 24 orders of four samples; 23 degrees of freedom, 49.7 at p = 0.001."""
    orders = [tuple(permute(hashes("t", epoch), 4, np.arange(4))) for epoch in range(2400)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24 and ((counts - 100) ** 2 / 100).sum() < 49.7


def test_permute__costs_nothing_per_sample() -> None:
    ids = permute(hashes("t", 0), 10**12, np.arange(1000))
    assert len(set(ids.tolist())) == 1000 and ids.min() >= 0 and ids.max() < 10**12
    assert abs(ids.mean() / 10**12 - 0.5) < 0.05  # standard error 0.009


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 50_000),
)
def test_interleave__shares_are_exact_and_nothing_is_skipped(
    weights: list[float], seed: int, start: int
) -> None:
    mix = Interleave.of("test", seed, weights)
    assert sum(mix.quotas) == CYCLE and min(mix.quotas) >= 1
    exact = np.array(weights) / sum(weights) * CYCLE
    assert np.abs(np.array(mix.quotas) - exact).max() < max(1.0, len(weights))
    kinds, earlier = mix.at(np.arange(start, start + 3000))
    for kind in range(len(weights)):
        numbers = earlier[kinds == kind]
        assert np.array_equal(
            numbers, np.arange(len(numbers)) + (numbers[0] if len(numbers) else 0)
        )
    again, same = mix.at(np.arange(start + 1000, start + 1010))
    assert np.array_equal(again, kinds[1000:1010]) and np.array_equal(same, earlier[1000:1010])


@pytest.mark.slow  # the loader's test of mixed sources is the quick one
def test_sampler__sources_by_weight_and_pure_batches() -> None:
    pools = [Pool(0, 1000, 0.6), Pool(1000, 1100, 0.3), Pool(1100, 1200, 0.1, is_pure=True)]
    ids = stream(pools, 0, 50, CYCLE // 10)
    source = np.searchsorted([1000, 1100], ids, side="right")
    is_pure = (source == 2).all(axis=1)
    assert np.array_equal(is_pure, (source == 2).any(axis=1))
    assert 60 <= is_pure.sum() <= 140  # 100 on average; 1,000 of every 10,000 exactly
    mixed = source[~is_pure]
    assert abs((mixed == 0).mean() - 2 / 3) < 0.01
    for number, pool in enumerate(pools):  # each source runs through its own permutations
        drawn = ids[source == number]
        first = drawn[: pool.stop - pool.start]
        assert len(set(first.tolist())) == len(first)


def test_sampler__one_pure_source_alone() -> None:
    ids = stream([Pool(0, 20, 1.0, is_pure=True)], 0, 10, 2).ravel()
    assert sorted(ids) == list(range(20))


def test_uniforms__look_uniform_and_independent() -> None:
    draws = uniforms(hashes("test", 0, np.arange(20_000)), 4)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01  # standard error 0.002
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03  # standard error 0.007
    assert not np.array_equal(draws, uniforms(hashes("other", 0, np.arange(20_000)), 4))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batches=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_sampler__batches_that_change_skip_nothing_and_repeat_nothing(
    seed: int, batches: list[tuple[int, int]]
) -> None:
    """(steps, images per batch) one after another are one stream, of mixed and of pure batches alike."""
    firsts = [sum(steps for steps, _ in batches[:n]) for n in range(len(batches))]
    sizes = [(first, images) for first, (_, images) in zip(firsts, batches, strict=True)]
    pools = [Pool(0, 40, 0.75), Pool(40, 60, 0.25, is_pure=True)]
    sampler = Sampler(pools, seed, sizes)
    drawn: list[list[int]] = [[], []]
    for first, (steps, images) in zip(firsts, batches, strict=True):
        for step in range(first, first + steps):
            ids = sampler.ids(step, np.arange(images)).tolist()
            drawn[ids[0] >= 40] += ids
    for pool, ids in zip(pools, drawn, strict=True):
        whole = Sampler([Pool(pool.start, pool.stop)], seed, [(0, max(1, len(ids)))])
        assert ids == whole.ids(0, np.arange(len(ids))).tolist()
