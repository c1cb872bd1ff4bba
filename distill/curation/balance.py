"""The balanced draw: as many images from every branch of a hierarchy as can be, down to its leaves.

At a node with a budget and branches of n_j images: the largest q with sum(min(q, n_j)) <= budget; every branch gets
min(q, n_j), and what is left goes, one each, to branches with more than q, chosen by the seed. Then the same inside every branch.
Vo et al. 2024 (arXiv 2405.15613), section 3.3.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int32, Int64

Leaves = Literal["random", "closest"]


def largest_quota(sizes: Int64[np.ndarray, " branches"], budget: int) -> int:
    """The largest q, at most the largest size, with sum(min(q, size)) <= budget."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(sizes, middle).sum()) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def quotas(
    sizes: Int64[np.ndarray, " branches"], budget: int, random: np.random.Generator
) -> Int64[np.ndarray, " branches"]:
    """How many each branch gives; their sum is the budget, or all there are."""
    quota = largest_quota(sizes, budget)
    given = np.minimum(sizes, quota)
    larger = np.flatnonzero(sizes > quota)
    left = min(budget - int(given.sum()), len(larger))
    given[random.permutation(larger)[:left]] += 1
    return given


def sample_balanced(
    parents: Sequence[Int32[np.ndarray, " _"]],
    target: int,
    *,
    seed: int,
    leaves: Leaves = "random",
    distances: Float[np.ndarray, " images"] | None = None,
    repeats: int = 1,
) -> Int64[np.ndarray, " images"]:
    """How many times each image is taken: up to ``repeats``, ``target`` in all or as many as there are.

    Args:
        parents: Of every level from the leaves up: the cluster of each image, then the cluster above of each cluster.
        target: Images to draw, with repeats.
        seed: Of the remainders and of the leaves; the same seed draws the same images.
        leaves: What a leaf gives first: ``random`` images, or those ``closest`` to its centroid.
        distances: To the centroid of the leaf, for ``closest``.
        repeats: How often an image may be taken.
    """
    random = np.random.default_rng([seed, 3])
    paths = cluster_paths(parents)
    num_images = paths.shape[1]
    ranks = random.permutation(num_images)
    order = np.lexsort((ranks if leaves == "random" else distances, *paths))
    taken = np.zeros(num_images, dtype=np.int64)
    todo = [
        (0, num_images, len(paths) - 1, target)
    ]  # ranges of `order` with their level and budget
    while todo:
        begin, end, level, budget = todo.pop()
        if level < 0:
            times, rest = divmod(min(budget, repeats * (end - begin)), end - begin)
            taken[order[begin:end]] = times
            taken[order[begin : begin + rest]] += 1
            continue
        edges = np.flatnonzero(np.diff(paths[level, order[begin:end]])) + 1
        edges = begin + np.concatenate(([0], edges, [end - begin]))
        given = quotas(repeats * np.diff(edges), budget, random)
        branches = zip(edges[:-1].tolist(), edges[1:].tolist(), given.tolist(), strict=True)
        todo += [(first, after, level - 1, count) for first, after, count in branches if count]
    return taken


def cluster_paths(
    parents: Sequence[Int32[np.ndarray, " _"]],
) -> Int32[np.ndarray, "levels _"]:
    """The cluster of every image at every level, from the leaves up."""
    paths = [parents[0]]
    for above in parents[1:]:
        paths.append(above[paths[-1]])
    return np.stack(paths)


def evenness(labels: np.ndarray, num_classes: int) -> float:
    """The entropy of the shares of classes divided by that of equal shares: 1 where all are as frequent, 0 for one class."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(max(num_classes, 2)))
