"""What curation costs, by counting: FLOPs, bytes, hours, memory of a rank. Nothing here is measured; speeds are given."""

import math
from dataclasses import dataclass

from distill.curation.hierarchy import (
    FIRST_ITERATIONS,
    FIT_ON_AT_LEAST,
    ITERATIONS,
    ROWS_PER_CENTROID,
    default_levels,
    default_rounds,
)
from distill.curation.kmeans import GREEDY_UP_TO, START_ROWS


@dataclass(frozen=True)
class Speeds:
    """FLOPs a second of one GPU. The defaults are assumed for an H100: 20% of its bf16 peak, 60% of its peak in fp32."""

    network: float = 2e14
    products: float = 4e13


@dataclass(frozen=True)
class CurationCost:
    """Of curating a pool; hours are of the products alone: those of a start on one GPU, the others in equal parts on all."""

    levels: tuple[int, ...]
    embed_flops: float
    cluster_flops: float
    embedding_bytes: int
    embed_hours: float
    cluster_hours: float
    bytes_per_rank: int


def curation_cost(
    num_images: int,
    target: int,
    *,
    width: int,
    flops_per_image: float,
    num_gpus: int,
    speeds: Speeds | None = None,
) -> CurationCost:
    """What embedding and clustering cost with the levels and rounds that ``curate`` chooses itself.

    Embeddings are in fp16. A rank holds the rows that centroids are fitted on, the union of a round, a cluster and a distance
    of every image, centroids and sums; images and blocks of embeddings pass by and are not counted.
    """
    speeds = speeds or Speeds()
    levels = default_levels(num_images, target)
    rounds = default_rounds(num_images)
    inputs = (num_images, *levels)
    pairs = list(zip(inputs, levels, strict=False))
    shared = sum(_shared_flops(rows, k, width, rounds) for rows, k in pairs)
    alone = sum(_start_flops(rows, k, width, rounds) for rows, k in pairs)
    embedding = flops_per_image * num_images
    fitted, k = _fitted_rows(num_images, levels[0]), levels[0]
    return CurationCost(
        levels,
        embedding,
        shared + alone,
        2 * num_images * width,
        embedding / speeds.network / num_gpus / 3600,
        (shared / num_gpus + alone) / speeds.products / 3600,
        4 * width * (fitted + fitted // 2) + 8 * num_images + k * (4 * width + 8 * (width + 1)),
    )


def _fitted_rows(num_rows: int, k: int) -> int:
    return min(num_rows, max(FIT_ON_AT_LEAST, ROWS_PER_CENTROID * k))


def _shared_flops(num_rows: int, k: int, width: int, rounds: int) -> float:
    """Products of the fits, of the assignments between rounds and of the last one to every row."""
    fitted, union, rounds = _sizes(num_rows, k, rounds)
    # a fit counts its clusters once more at its end, to drop those that are empty
    of_rounds = rounds * ((ITERATIONS + 1) * union + fitted)
    return 2.0 * k * width * ((FIRST_ITERATIONS + 1) * fitted + of_rounds + num_rows)


def _start_flops(num_rows: int, k: int, width: int, rounds: int) -> float:
    """Products of k-means++, which one rank computes."""
    fitted, union, rounds = _sizes(num_rows, k, rounds)
    candidates = 2 + int(math.log(k)) if k <= GREEDY_UP_TO else 1
    samples = sum(min(rows, max(START_ROWS, 4 * k)) for rows in (fitted, *[union] * rounds))
    return 2.0 * k * width * candidates * samples


def _sizes(num_rows: int, k: int, rounds: int) -> tuple[int, int, int]:
    """Rows of the first fit, rows of a round, and how many rounds there are."""
    fitted = _fitted_rows(num_rows, k)
    closest = fitted // k // 2
    return fitted, min(fitted, closest * k), rounds if closest > 1 else 0
