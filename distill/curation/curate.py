"""From embeddings to a balanced choice of so many images: checks, the hierarchy of their clusters, the balanced draw."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from distill.curation.balance import Leaves, cluster_paths, sample_balanced
from distill.curation.hierarchy import (
    Fitted,
    Settings,
    build,
    check_levels,
    default_levels,
    default_rounds,
)
from distill.curation.rows import Vectors, rank_blocks, sum_over_ranks
from distill.errors import DataError


@dataclass(frozen=True)
class CurationTarget:
    """What to choose, and how.

    Attributes:
        target: Images to choose, with repeats.
        levels: Clusters from the images up; None follows from pool and target.
        leaves: What a cluster of images gives first.
        repeats: How often an image may be chosen.
        made_from: A fingerprint of the embeddings, so that clusters of others are not gone on with.
    """

    target: int
    levels: tuple[int, ...] | None = None
    seed: int = 0
    leaves: Leaves = "random"
    repeats: int = 1
    made_from: str = ""


@dataclass(frozen=True)
class Curated:
    """For every image how often it is chosen, its clusters from the images up, and the cosine to the first one's centroid; and the ``levels`` that were wanted."""

    levels: tuple[int, ...]
    times: Int64[np.ndarray, " images"]
    paths: Int32[np.ndarray, "levels images"]
    similarity: Float[np.ndarray, " images"]


@dataclass(frozen=True)
class UnitVectors:
    """Chosen rows of embeddings, brought to length 1 when they are read."""

    embeddings: Vectors
    chosen: Int64[np.ndarray, " chosen"] | None = None  # ascending; None for all

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.embeddings.num_rows if self.chosen is None else len(self.chosen)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.embeddings.width

    def block(self, begin: int, end: int) -> Float[Tensor, "rows width"]:
        """Rows from ``begin`` to before ``end`` in fp32, of length 1 unless they are zero or not finite."""
        if self.chosen is None:
            values = self.embeddings.block(begin, end).float()
        else:
            wanted = self.chosen[begin:end]
            first = int(wanted[0])
            values = self.embeddings.block(first, int(wanted[-1]) + 1).float()
            values = values[torch.from_numpy(wanted - first)]
        return values / values.norm(dim=1, keepdim=True).clamp(min=1e-12)


def curate(
    embeddings: Vectors,
    choice: CurationTarget,
    folder: Path,
    *,
    pool: Bool[np.ndarray, " images"] | None = None,
    progress: Fitted | None = None,
) -> Curated:
    """Chooses ``choice.target`` images; the same choice on any number of ranks, and after a kill.

    Args:
        embeddings: Of all images, on every rank.
        choice: What to choose.
        folder: Where clusters are kept while they are made; the same call goes on from there.
        pool: The images that may be chosen; None for all. Others get clusters of -1 and a similarity of 0.
        progress: Called after each fit of centroids with how many are done, and of how many.

    Raises:
        DataError: the target is larger than the pool, levels that cannot be, embeddings that are zero or not finite.
    """
    chosen = np.arange(embeddings.num_rows) if pool is None else np.flatnonzero(pool)
    _check_target(choice, len(chosen))
    levels = choice.levels or default_levels(len(chosen), choice.target)
    check_levels(levels, len(chosen))
    vectors = UnitVectors(embeddings, None if pool is None else chosen)
    check_lengths(vectors, chosen)
    made_from = f"{choice.made_from} {hashlib.sha256(chosen.tobytes()).hexdigest()}"
    settings = Settings(levels, choice.seed, default_rounds(len(chosen)), made_from=made_from)
    found = build(vectors, settings, folder, progress)
    parents = [level.parents for level in found]
    times = sample_balanced(
        parents,
        choice.target,
        seed=choice.seed,
        leaves=choice.leaves,
        distances=found[0].distances,
        repeats=choice.repeats,
    )
    total = embeddings.num_rows
    curated = Curated(
        levels,
        np.zeros(total, np.int64),
        np.full((len(levels), total), -1, np.int32),
        np.zeros(total, np.float32),
    )
    curated.times[chosen] = times
    curated.paths[:, chosen] = cluster_paths(parents)
    curated.similarity[chosen] = 1 - found[0].distances / 2
    return curated


def _check_target(choice: CurationTarget, num_images: int) -> None:
    most = num_images * choice.repeats
    if not 1 <= choice.target <= most:
        again = f", each up to {choice.repeats} times" if choice.repeats > 1 else ""
        raise DataError(
            f"a target of {choice.target:,} of {num_images:,} images{again}",
            fix=f"Give a target from 1 to {most:,}." if most else "Embed pictures first.",
        )


def check_lengths(vectors: UnitVectors, chosen: Int64[np.ndarray, " chosen"]) -> None:
    """Refuses rows that have no direction; ``chosen`` are their numbers in the pool.

    Raises:
        DataError: embeddings are zero or not finite.
    """
    wrong = torch.zeros(vectors.num_rows, dtype=torch.int32)
    for begin, end in rank_blocks(vectors.num_rows):
        lengths = vectors.block(begin, end).norm(dim=1)
        wrong[begin:end] = ~(lengths > 0.5)
    positions = chosen[sum_over_ranks(wrong).numpy() > 0]
    if len(positions):
        raise DataError(
            f"{len(positions):,} of {len(chosen):,} embeddings are zero or not finite, the first in row {positions[0]:,}",
            fix="Embed these pictures again, or leave them out of the pool.",
        )
