"""Copies among images, in four tiers; each looks at what the tier before kept, and every dropped image has its twin.

exact         the same bytes; the first stays
perceptual    64 bits that differ in a few, and thumbnails that agree; groups are connected components, the largest picture stays
cropped       the same for all of one and the inside of the other (``distill.curation.hashes``)
semantic      features of cosine above 1 - eps to an image before, the largest pictures first; an image before counts though it
              was dropped itself. SemDeDup (arXiv 2303.09540), which has the images farthest from their centroid first

A re-encoded image has seldom all 64 bits of its original, so bits alone are either too strict or take different pictures for
copies. Thumbnails decide: their difference bounds the difference of their means, so that in the order of their means only
neighbours are compared, and still no pair is missed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8, UInt64

from distill.curation.curate import UnitVectors, check_lengths
from distill.curation.hashes import ImageHashes, Progress
from distill.curation.kmeans import assign, fit
from distill.curation.rows import Vectors, in_memory
from distill.errors import DataError

Reason = Literal["exact", "perceptual", "cropped", "semantic", "broken"]
HAMMING = 10  # of 64 bits: finds 96% of JPEGs of quality 50, where 0 finds a third
THUMBNAIL_RMS = 4.0  # of 255 levels
RMS_OF_SPREAD = 0.7  # and at most this share of the spread of a thumbnail: nearly black pictures differ in little
BLOCK = 1024
FULL_POOL = 50_000  # images: beyond, only those of one cluster are compared
CLUSTER_IMAGES = 5_000  # of a cluster, on average
ITERATIONS = 10


@dataclass(frozen=True)
class Duplicates:
    """Of every image why it is dropped, its twin and their similarity.

    Attributes:
        reasons: Empty for an image that is kept.
        twins: The row of the image that it is a copy of; -1 for none. A twin may be a copy itself.
        similarity: 1 for the same bytes, the share of equal bits with the nearest of its group, or the cosine.
    """

    reasons: list[Reason | Literal[""]]
    twins: Int64[np.ndarray, " images"]
    similarity: Float[np.ndarray, " images"]

    def remaining(self) -> Int64[np.ndarray, " remaining"]:
        """Rows of the images that stay."""
        return np.flatnonzero([not reason for reason in self.reasons])

    def drop(self, row: int, reason: Reason, twin: int, similarity: float) -> None:
        """Notes a copy, in place."""
        self.reasons[row], self.twins[row], self.similarity[row] = reason, twin, similarity


def find_copies(
    hashes: ImageHashes, pixels: Int64[np.ndarray, " images"], hamming: int = HAMMING
) -> Duplicates:
    """The tiers but the last; ``pixels`` is height times width of each. Images that cannot be used are dropped as broken."""
    count = len(pixels)
    found = Duplicates([""] * count, np.full(count, -1, np.int64), np.zeros(count))
    for row in np.flatnonzero(~hashes.usable):
        found.drop(int(row), "broken", -1, 0.0)
    first: dict[bytes, int] = {}
    for row in found.remaining().tolist():
        twin = first.setdefault(hashes.sha256[row].tobytes(), row)
        if twin != row:
            found.drop(row, "exact", twin, 1.0)
    tiers: tuple[tuple[Reason, int], ...] = ("perceptual", 1), ("cropped", 2)
    for reason, parts in tiers:
        order = _largest_first(found.remaining(), pixels, hashes.num_bytes)
        rows = np.tile(order, parts)
        part = np.repeat(np.arange(parts), len(order))
        bits, thumbnails = hashes.bits[part, rows], hashes.thumbnails[part, rows]
        pairs = (
            (one % len(order), other % len(order), similarity)
            for one, other, similarity in _close_pairs(bits, thumbnails, hamming)
            if part[one] + part[other] < 2
        )
        _drop_smaller(found, order, pairs, reason)
    return found


def _drop_smaller(
    found: Duplicates,
    order: Int64[np.ndarray, " rows"],
    pairs: Iterator[tuple[int, int, float]],
    reason: Reason,
) -> None:
    """Drops all but the first in ``order`` of each connected group of pairs, which are positions in it.

    The similarity is that of the most similar pair.
    """
    leader, highest = list(range(len(order))), np.zeros(len(order))

    def root(at: int) -> int:
        while leader[at] != at:
            leader[at] = leader[leader[at]]
            at = leader[at]
        return at

    for one, other, similarity in pairs:
        if one != other:
            first, second = sorted((root(one), root(other)))
            leader[second] = first
            highest[[one, other]] = np.maximum(highest[[one, other]], similarity)
    for at, row in enumerate(order.tolist()):
        if root(at) != at:
            found.drop(row, reason, int(order[root(at)]), float(highest[at]))


def _largest_first(
    rows: Int64[np.ndarray, " rows"], pixels: np.ndarray, num_bytes: np.ndarray
) -> Int64[np.ndarray, " rows"]:
    """Rows by pixels, then bytes, from the largest; of equal ones the first."""
    return rows[np.lexsort((rows, -num_bytes[rows], -pixels[rows]))]


def _close_pairs(
    bits: UInt64[np.ndarray, " entries"],
    thumbnails: UInt8[np.ndarray, "entries 192"],
    hamming: int,
) -> Iterator[tuple[int, int, float]]:
    """Positions of entries whose bits differ in at most ``hamming`` and whose thumbnails agree, and the share of equal bits."""
    means = thumbnails.mean(axis=1)
    order = np.argsort(means, kind="stable")
    bits, thumbnails, means = bits[order], thumbnails[order].astype(np.float32), means[order]
    spread = thumbnails.reshape(len(order), -1, 3).std(axis=1).mean(axis=1)
    limits = np.minimum(THUMBNAIL_RMS, RMS_OF_SPREAD * spread)
    ends = np.searchsorted(means, means + THUMBNAIL_RMS, side="right")
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        last = int(ends[end - 1])
        differing = np.bitwise_count(bits[begin:end, None] ^ bits[None, begin:last])
        one, other = np.nonzero(differing <= hamming)
        is_later = other > one
        one, other = one[is_later], other[is_later]
        for start in range(0, len(one), BLOCK):
            some = slice(start, start + BLOCK)
            left, right = begin + one[some], begin + other[some]
            rms = np.sqrt(np.square(thumbnails[left] - thumbnails[right]).mean(axis=1))
            close = rms <= np.minimum(limits[left], limits[right])
            equal = 1 - differing[one[some], other[some]] / 64
            found = order[left], order[right], equal
            yield from zip(*(values[close].tolist() for values in found), strict=True)


def find_semantic_copies(
    found: Duplicates,
    embeddings: Vectors,
    eps: float,
    sizes: tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, " images"]],
    has_features: Bool[np.ndarray, " images"],
    progress: Progress | None = None,
) -> None:
    """Notes the last tier in ``found``, of the images that it keeps and that have features. Holds these in memory, in fp32.

    Up to ``FULL_POOL`` images all pairs are compared: images x images / 2 products. Beyond, k-means makes clusters of about
    ``CLUSTER_IMAGES``, and copies in two of them are missed. ``sizes``: pixels and bytes of every image.

    Raises:
        DataError: eps is not between 0 and 1, or features are not finite.
    """
    if not 0 < eps < 1:
        raise DataError(f"--semantic {eps:g}: not between 0 and 1", fix="Write --semantic 0.15.")
    rows = _largest_first(found.remaining()[has_features[found.remaining()]], *sizes)
    ascending = np.sort(rows)
    vectors = UnitVectors(embeddings, ascending)
    check_lengths(vectors, ascending)
    all_features = in_memory(vectors, np.arange(len(rows)))
    labels = np.zeros(len(rows), np.int32)
    if len(rows) > FULL_POOL:
        k = len(rows) // CLUSTER_IMAGES
        centroids = fit(all_features, k, seed=(0,), iterations=ITERATIONS, spherical=True)
        labels = assign(all_features, centroids).labels
    at = np.searchsorted(ascending, rows)
    done = 0
    for cluster in np.unique(labels).tolist():
        chosen = at[labels[at] == cluster]
        features = all_features.values[torch.from_numpy(chosen)]
        members = ascending[chosen]
        for begin in range(0, len(members), BLOCK):
            end = min(begin + BLOCK, len(members))
            cosines = features[begin:end] @ features[:end].T
            best, twin = cosines.tril(diagonal=begin - 1).max(dim=1)  # with images before alone
            for each in (best > 1 - eps).nonzero().flatten().tolist():
                other = int(members[int(twin[each])])
                found.drop(int(members[begin + each]), "semantic", other, float(best[each]))
            done += end - begin
            if progress:
                progress(done, len(rows))
