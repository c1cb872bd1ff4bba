import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.counter import hashes, uniforms
from distill.data.sampler import sample_ids


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), samples=st.integers(1, 60), batch=st.integers(1, 40))
def test_sample_ids__every_epoch_is_a_permutation(seed: int, samples: int, batch: int) -> None:
    num_steps = -(-3 * samples // batch)
    stream = np.concatenate(
        [sample_ids(seed, samples, step, batch, np.arange(batch)) for step in range(num_steps)]
    )
    for epoch in range(3):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_sample_ids__any_part_of_a_batch_alone() -> None:
    whole = sample_ids(3, 50, 7, 32, np.arange(32))
    assert np.array_equal(sample_ids(3, 50, 7, 32, np.arange(10, 20)), whole[10:20])
    assert not np.array_equal(whole, sample_ids(4, 50, 7, 32, np.arange(32)))


def test_uniforms__look_uniform_and_independent() -> None:
    draws = uniforms(hashes("test", 0, np.arange(20_000)), 4)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01  # standard error 0.002
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03  # standard error 0.007
    assert not np.array_equal(draws, uniforms(hashes("other", 0, np.arange(20_000)), 4))
