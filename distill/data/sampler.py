"""Which sample stands where: endless streams of permutations and fixed shares, pure functions of the seed.

No state, so resuming is free, and nothing grows with the number of samples: a permutation is
computed at the positions that are requested (a Feistel network over the smallest power of four that
holds all samples, walked until the result is a sample; Black and Rogaway 2002), and how often a
source was drawn before any place follows from fixed quotas per cycle.

Three levels:

    batch      a *pure* source fills some batches alone; all others are mixed
    place      in a mixed batch each place belongs to one source, by weight
    sample     each source's stream is one permutation of its samples after another
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distill.data.stateless_random import Hash, hashes

ROUNDS = 6  # four are a pseudo-random permutation for large halves; small sets have small halves
CYCLE = (
    10_000  # places (or batches) over which shares are exact; weights count in steps of 1/10,000
)

Ints = NDArray[np.int64]
Triple = tuple[float, float, float]
PixelStats = tuple[Triple, Triple]
BatchSizes = Sequence[
    tuple[int, int]
]  # (first step, images per batch from it on), ascending from 0


def permute(key: Hash, num_samples: int, positions: Ints) -> Ints:
    """Where the permutation of ``range(num_samples)`` named by ``key`` sends each place."""
    half = max(1, -(-(num_samples - 1).bit_length() // 2))  # bits of each half
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    found = positions.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():  # four tries on average at most
        left, right = found[outside] >> shift, found[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (np.asarray(hashes("feistel", key, turn, right)) & mask)
        found[outside] = (left << shift) | right
        outside = found >= np.uint64(num_samples)
    return found.astype(np.int64)


@dataclass(frozen=True)
class Interleave:
    """An endless stream of kinds in fixed shares: exact over every cycle, in an order drawn per cycle.

    Args:
        purpose: separates this stream from others of the same seed.
        quotas: how often each kind comes in a cycle.
    """

    purpose: str
    seed: int
    quotas: tuple[int, ...]

    @classmethod
    def of(cls, purpose: str, seed: int, weights: Sequence[float]) -> "Interleave":
        """Quotas in proportion to ``weights``, by largest remainder; a kind with a weight comes at least once."""
        parts = np.asarray(weights, float) / sum(weights) * CYCLE
        quotas = np.maximum(np.floor(parts), 1).astype(int)
        order = np.argsort(quotas - parts, kind="stable")  # most underserved first
        missing = CYCLE - int(quotas.sum())
        for kind in range(abs(missing)):
            chosen = order[kind % len(order)] if missing > 0 else int(quotas.argmax())
            quotas[chosen] += 1 if missing > 0 else -1
        return cls(purpose, seed, tuple(quotas.tolist()))

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Kind at each place, and how many of that kind came before it."""
        if len(self.quotas) == 1:
            return np.zeros(len(positions), np.int64), positions
        kinds, earlier = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        cycles, inside = np.divmod(positions, sum(self.quotas))
        quotas = np.asarray(self.quotas, np.int64)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            order, before = _cycle(self.purpose, self.seed, self.quotas, int(cycle))
            kinds[here] = order[inside[here]]
            earlier[here] = cycle * quotas[kinds[here]] + before[inside[here]]
        return kinds, earlier

    def before(self, position: int, kind: int) -> int:
        """How many of a kind stand before a place."""
        if len(self.quotas) == 1:
            return position
        cycle, inside = divmod(position, sum(self.quotas))
        order, _ = _cycle(self.purpose, self.seed, self.quotas, cycle)
        return cycle * self.quotas[kind] + int((order[:inside] == kind).sum())


@lru_cache(maxsize=16)  # a step looks at one cycle or two; look-ahead at the same ones
def _cycle(purpose: str, seed: int, quotas: tuple[int, ...], cycle: int) -> tuple[Ints, Ints]:
    """Kinds of one cycle in order, and for each how many of its kind stand before it in the cycle."""
    kinds = np.repeat(np.arange(len(quotas)), quotas)
    keys = hashes(purpose, seed, cycle, np.arange(len(kinds)))
    kinds = kinds[np.argsort(keys, kind="stable")]
    before = np.empty(len(kinds), np.int64)
    for kind, quota in enumerate(quotas):
        before[kinds == kind] = np.arange(quota)
    return kinds, before


@dataclass(frozen=True)
class Pool:
    """Samples ``start`` to ``stop`` of the index that are drawn as one.

    ``weight`` is its share of all images, ``is_pure``: its images come in separate batches;
    ``pixel_stats`` are their mean and standard deviation, where a source has separate ones.
    """

    start: int
    stop: int
    weight: float = 1.0
    is_pure: bool = False
    pixel_stats: PixelStats | None = None


class Sampler:
    """Sample ids at any positions of any step's global batch."""

    def __init__(self, pools: Sequence[Pool], seed: int, sizes: BatchSizes) -> None:
        self.seed, self._sizes = seed, tuple(sizes)
        self._mixed = [pool for pool in pools if not pool.is_pure]
        self._pure = [pool for pool in pools if pool.is_pure]
        mixed = sum(pool.weight for pool in self._mixed)
        batches = [mixed] if self._mixed else []
        self._batches = Interleave.of(
            "batches", seed, [*batches, *(pool.weight for pool in self._pure)]
        )
        weights = [pool.weight for pool in self._mixed]
        self._pools_at = Interleave.of("places", seed, weights) if weights else None
        self._pools = (*self._mixed, *self._pure)

    @property
    def has_pixel_stats(self) -> bool:
        """Pools have separate pixel statistics."""
        return self._pools[0].pixel_stats is not None

    def ids(self, step: int, positions: Ints) -> Ints:
        """Sample ids at ``positions`` of a step."""
        return self.draw(step, positions)[0]

    def draw(self, step: int, positions: Ints) -> tuple[Ints, list[Pool]]:
        """Sample ids, and the pool of each."""
        kind = int(self._batches.at(np.array([step]))[0][0])
        stream = self._images_before(step, kind) + positions
        if self._pools_at is None or kind:
            pool_index = len(self._mixed) + kind - (self._pools_at is not None)
            return self._draw(pool_index, stream), [self._pools[pool_index]] * len(positions)
        pool_indices, earlier = self._pools_at.at(stream)
        ids = np.empty(len(positions), np.int64)
        for pool_index in np.unique(pool_indices):
            here = pool_indices == pool_index
            ids[here] = self._draw(int(pool_index), earlier[here])
        return ids, [self._pools[pool_index] for pool_index in pool_indices]

    def _images_before(self, step: int, kind: int) -> int:
        """Images of all batches of a kind before a step."""
        ends = [first for first, _ in self._sizes[1:]] + [step]
        return sum(
            images
            * (self._batches.before(min(end, step), kind) - self._batches.before(first, kind))
            for (first, images), end in zip(self._sizes, ends, strict=True)
            if first < step
        )

    def _draw(self, pool_index: int, stream: Ints) -> Ints:
        """The samples at some places of one pool's stream of permutations."""
        pool = self._pools[pool_index]
        num_samples = pool.stop - pool.start
        epochs, positions = np.divmod(stream, num_samples)
        ids = np.empty(len(stream), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = hashes("order", self.seed, pool.start, int(epoch))
            ids[here] = pool.start + permute(key, num_samples, positions[here])
        return ids
