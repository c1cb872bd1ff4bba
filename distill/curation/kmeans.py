"""k-means in blocks, on one machine or many ranks, with the same clusters on any number of them.

    start        k-means++ on a sample (Arthur and Vassilvitskii 2007), greedy where k is small: rank 0, then broadcast
    iteration    each rank: products of its blocks with all centroids, the nearest, sums and counts
                 all-reduce of sums and counts, exact (``distill.curation.rows``)
                 a centroid is the mean of its rows, or that mean at length 1 (spherical)

Ties: of two centroids at the same distance in fp32 the first is taken; a rank whose processor rounds a product otherwise may
take the other one. Empty clusters: they take the rows farthest from their centroids, the farthest first, of equal ones the
first row; rows that lie on their centroid are not taken. What is empty at the end is dropped, so that there may be fewer
clusters than ``k``, as for rows that are all the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from distill.curation.rows import (
    Vectors,
    bits_after_the_point,
    is_shared,
    rank_blocks,
    sum_over_ranks,
    take_rows,
    to_fixed,
)

START_ROWS = 16_384  # k-means++ looks at so many at least, and at four for each centroid
GREEDY_UP_TO = 2_048  # centroids: each is the best of 2 + log(k) candidates, as in scikit-learn
AT_ONCE = 16  # beyond, one for every so many there are is drawn at once, as in k-means|| (Bahmani et al. 2012)
ON_CENTROID = 1e-6  # of the largest squared length: a row this near lies on its centroid
Progress = Callable[[int, int], None]  # blocks done, of how many


@dataclass(frozen=True)
class Assigned:
    """The nearest centroid of every row and the squared distance to it, on every rank."""

    labels: Int32[np.ndarray, " rows"]
    distances: Float[np.ndarray, " rows"]


def fit(
    rows: Vectors, k: int, *, seed: tuple[int, ...], iterations: int, spherical: bool
) -> Float[Tensor, "clusters width"]:
    """Centroids in fp32 of at most ``k`` clusters, none of them empty.

    Communicates: the sample of the start once, a sum of k x (width + 1) integers of 64 bits an iteration.
    """
    centroids = start(rows, k, seed)
    largest = torch.zeros(1)
    for begin, end in rank_blocks(rows.num_rows):
        largest = torch.maximum(largest, rows.block(begin, end).abs().max())
    if is_shared():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    bits = bits_after_the_point(rows.num_rows, float(largest))
    before = None
    for _ in range(iterations):
        sums, counts = _sums(rows, centroids, bits)
        if before is not None and torch.equal(sums, before):
            break
        before = sums
        full = counts > 0
        means = sums[full].double() / 2.0**bits / counts[full].unsqueeze(1)
        if spherical:
            means /= means.norm(dim=1, keepdim=True).clamp(min=1e-12)
        if not bool(full.all()):
            far = _farthest(rows, centroids, int((~full).sum()))
            centroids = torch.cat([means.float(), far])
        else:
            centroids = means.float()
    _, counts = _sums(rows, centroids, bits)
    return centroids[counts > 0]


def start(rows: Vectors, k: int, seed: tuple[int, ...]) -> Float[Tensor, "clusters width"]:
    """k-means++: rows chosen one after the other, each with a probability that grows with its squared distance to those before.

    Fewer than ``k`` where all rows lie on chosen ones. Computed on rank 0 from a sample, then sent to all.
    """
    random = np.random.default_rng([*seed, 0])
    most = max(START_ROWS, 4 * k)
    wanted = np.arange(rows.num_rows)
    if rows.num_rows > most:
        wanted = np.sort(random.choice(rows.num_rows, most, replace=False))
    sample = take_rows(rows, wanted)
    chosen = torch.zeros(k, dtype=torch.int64)
    if not is_shared() or dist.get_rank() == 0:
        found = _plus_plus(sample, k, random)
        chosen[: len(found)] = torch.tensor(found) + 1
    chosen = sum_over_ranks(chosen)
    return sample[chosen[chosen > 0] - 1]


def _plus_plus(sample: Tensor, k: int, random: np.random.Generator) -> list[int]:
    greedy = k <= GREEDY_UP_TO
    lengths = sample.square().sum(dim=1)
    smallest = ON_CENTROID * float(lengths.max())
    near = torch.full((len(sample),), torch.inf)
    new = torch.from_numpy(random.integers(len(sample), size=1))
    chosen: list[int] = []
    while True:
        distances = lengths + lengths[new].unsqueeze(1) - 2 * sample[new] @ sample.T
        distances = torch.minimum(distances.masked_fill_(distances < smallest, 0), near)
        if greedy:
            best = int(distances.sum(dim=1, dtype=torch.float64).argmin())
            chosen.append(int(new[best]))
            near = distances[best]
        else:
            chosen += new.tolist()
            near = distances.amin(dim=0)
        total = near.double().cumsum(0).numpy()
        if len(chosen) >= k or total[-1] <= 0:
            return chosen[:k]
        count = 2 + int(math.log(k)) if greedy else 1 + len(chosen) // AT_ONCE
        found = np.searchsorted(total, random.random(count) * total[-1], side="right")
        new = torch.from_numpy(np.unique(np.minimum(found, len(sample) - 1)))


def assign(
    rows: Vectors, centroids: Float[Tensor, "clusters width"], progress: Progress | None = None
) -> Assigned:
    """The nearest centroid of every row; of equally near ones the first. One all-reduce of rows x 8 bytes."""
    labels = torch.zeros(rows.num_rows, dtype=torch.int32)
    distances = torch.zeros(rows.num_rows)
    halves = centroids.square().sum(dim=1) / 2
    blocks = list(rank_blocks(rows.num_rows))
    for done, (begin, end) in enumerate(blocks, start=1):
        nearest, distance = _nearest(rows.block(begin, end), centroids, halves)
        labels[begin:end], distances[begin:end] = nearest, distance
        if progress:
            progress(done, len(blocks))
    sum_over_ranks(labels)
    sum_over_ranks(distances)
    return Assigned(labels.numpy(), distances.numpy())


def inertia(rows: Vectors, centroids: Float[Tensor, "clusters width"]) -> float:
    """The sum of squared distances to the nearest centroid."""
    return float(assign(rows, centroids).distances.sum(dtype=np.float64))


def _nearest(block: Tensor, centroids: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    score, nearest = (block @ centroids.T).sub_(halves).max(dim=1)
    return nearest, (block.square().sum(dim=1) - 2 * score).clamp_(min=0)


def _sums(
    rows: Vectors, centroids: Tensor, bits: int
) -> tuple[Int64[Tensor, "k d"], Int64[Tensor, " k"]]:
    """Sums of the rows of each cluster in fixed point, and how many they are."""
    k, width = centroids.shape
    both = torch.zeros(k, width + 1, dtype=torch.int64)
    halves = centroids.square().sum(dim=1) / 2
    for begin, end in rank_blocks(rows.num_rows):
        block = rows.block(begin, end)
        nearest, _ = _nearest(block, centroids, halves)
        fixed = to_fixed(block, bits)
        both.index_add_(0, nearest, torch.cat([fixed, torch.ones(len(block), 1).long()], dim=1))
    sum_over_ranks(both)
    return both[:, :width], both[:, width]


def _farthest(rows: Vectors, centroids: Tensor, count: int) -> Tensor:
    """Up to ``count`` rows farthest from their centroid, those that lie on it left out."""
    distances = assign(rows, centroids).distances
    order = np.argsort(-distances, kind="stable")[:count]
    largest = max(1.0, float(centroids.square().sum(dim=1).max()))
    order = order[distances[order] > ON_CENTROID * largest]
    return take_rows(rows, np.sort(order))
