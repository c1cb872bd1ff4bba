"""What a choice did to a pool, in numbers: even, covering, spread over clusters, beside a random draw of the same size.

evenness                 entropy of the shares of classes, divided by that of equal shares
coverage                 classes with an image, of those of the pool
share of the largest 1%  of the images, those in the most frequent hundredth of the clusters (one at least), of every level
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from distill.curation.balance import evenness
from distill.curation.chosen import Chosen

LARGEST = 0.01  # of the clusters


@dataclass(frozen=True)
class SetFacts:
    """Numbers of one set of images; None and nothing where there are no labels or clusters.

    Attributes:
        images: With repeats.
        evenness: 0 for one class, 1 where all classes of the pool are as frequent.
        classes: With an image.
        largest: Of every level from the images up, the share of its largest clusters.
    """

    images: int
    evenness: float | None
    classes: int | None
    largest: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """A choice, the pool it is from and a random draw from it, as times of every image.

    ``pool``: images that might have been chosen; without those that another choice or a broken file left out.
    """

    chosen: Chosen
    pool: Int64[np.ndarray, " images"]
    random: Int64[np.ndarray, " images"]
    clusters: np.ndarray | None  # int32, [levels, images]

    @property
    def sets(self) -> dict[str, Int64[np.ndarray, " images"]]:
        """How often each has every image."""
        return {"pool": self.pool, "chosen": self.chosen.times, "random": self.random}

    def facts(self, times: Int64[np.ndarray, " images"]) -> SetFacts:
        """The numbers of one set."""
        labels = self.chosen.pool.labels
        even = classes = None
        if labels is not None:
            num_classes = len(np.unique(labels[(self.pool > 0) & (labels >= 0)]))
            found = np.repeat(labels, times)
            found = found[found >= 0]
            classes = len(np.unique(found))
            even = evenness(found, num_classes) if classes else None
        levels = () if self.clusters is None else tuple(self.clusters)
        largest = tuple(_share_of_largest(level, times) for level in levels)
        return SetFacts(int(times.sum()), even, classes, largest)


def evidence_of(chosen: Chosen) -> Evidence:
    """A choice beside a random draw from its pool by the seed of the choice, each image once."""
    count, clusters = len(chosen.pool), chosen.array("clusters")
    pool = np.ones(count, np.int64) if clusters is None else (clusters[0] >= 0).astype(np.int64)
    for each in chosen.dropped():
        if each["reason"] == "broken":
            pool[each["row"]] = 0
    rows = np.flatnonzero(pool)
    seed = int(chosen.facts.get("seed", 0))
    drawn = np.random.default_rng([seed, 4]).permutation(rows)[: int(chosen.times.sum())]
    random = np.zeros(count, np.int64)
    random[drawn] = 1
    return Evidence(chosen, pool, random, clusters)


def cluster_sizes(
    clusters: np.ndarray, times: Int64[np.ndarray, " images"]
) -> Int64[np.ndarray, " clusters"]:
    """Images of every cluster of one level, with repeats; rows of no cluster are -1."""
    inside = clusters >= 0
    count = int(clusters.max(initial=-1)) + 1
    return np.bincount(clusters[inside], times[inside], minlength=count).astype(np.int64)


def _share_of_largest(clusters: np.ndarray, times: Int64[np.ndarray, " images"]) -> float:
    sizes = np.sort(cluster_sizes(clusters, times))[::-1]
    return float(sizes[: max(1, round(LARGEST * len(sizes)))].sum() / max(1, sizes.sum()))
