"""Which sample stands where: one endless stream of permutations, a pure function of the seed. No state, so resuming is free."""

import numpy as np
from numpy.typing import NDArray

from distill.data.counter import hashes


def sample_ids(
    seed: int, num_samples: int, step: int, images_global: int, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sample ids at ``positions`` of step ``step``: each epoch of the stream is one permutation of all samples."""
    stream = np.int64(step) * images_global + positions
    epochs, places = np.divmod(stream, num_samples)
    ids = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        keys = hashes("order", seed, int(epoch), np.arange(num_samples))
        permutation = np.argsort(keys, kind="stable")
        ids[epochs == epoch] = permutation[places[epochs == epoch]]
    return ids
