"""Hierarchical k-means with resampling: clusters of images, clusters of their centroids, and so on up.

At each level k-means (``distill.curation.kmeans``) runs on its inputs: the images, or the centroids of the level below.
Then so many rounds: from every cluster the r inputs closest to its centroid, k-means started anew on their union, every
input assigned again. What is common gives no more of the union than what is rare, so that clusters spread over the
kinds of pictures, whatever their frequency. Vo et al. 2024 (arXiv 2405.15613), section 3.2.

Beside the hierarchy lies what it was made from; every fit is kept as soon as it ends, so that the same call goes on after a kill.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int32
from torch import Tensor

from distill.curation.kmeans import assign, fit
from distill.curation.rows import (
    Vectors,
    VectorsInMemory,
    in_memory,
    is_first_rank,
    is_shared,
    write_array,
)
from distill.errors import DataError, RecipeError
from distill.runfolder.files import make_folder, remove
from distill.runfolder.status import write_json

FIT_ON_AT_LEAST = 2**17  # rows; and at least ROWS_PER_CENTROID for each centroid
ROWS_PER_CENTROID = 32
FIRST_ITERATIONS, ITERATIONS = 20, 10
SMALL_POOL = 100_000  # images
MADE_FROM = "hierarchy.json"
Fitted = Callable[[int, int], None]  # fits done, of how many


@dataclass(frozen=True)
class Settings:
    """How a hierarchy is made.

    Attributes:
        levels: Clusters of each level from the images up, each smaller than the one before.
        rounds: Of resampling at each level; none where r would be one.
        closest: r; None takes half the mean cluster of the level.
        spherical: Vectors are of length 1 and centroids are brought to it.
    """

    levels: tuple[int, ...]
    seed: int = 0
    rounds: int = 3
    closest: int | None = None
    spherical: bool = True
    made_from: str = ""  # a fingerprint of the rows


@dataclass(frozen=True)
class Level:
    """Clusters of one level; ``parents`` has the cluster of each input, ``distances`` the squared distance to its centroid."""

    centroids: Float[Tensor, "clusters width"]
    parents: Int32[np.ndarray, " inputs"]
    distances: Float[np.ndarray, " inputs"]


def default_levels(num_images: int, target: int) -> tuple[int, ...]:
    """Three levels for a draw of ``target`` of ``num_images``.

    First level: two clusters for each image to draw, but five images in each on average, and at most 16 sqrt(images), so
    that the cost grows with images^1.5. Top level: half the target, at most a quarter of the first; a budget of two images for
    each cluster. Kinds of pictures that share a top cluster share its budget, so the draw is most even with more clusters
    than kinds. The level between is the geometric mean. Small pools have fewer levels.
    """
    first = max(1, min(2 * target, num_images // 5, int(16 * math.sqrt(num_images))))
    top = max(1, min(target // 2, first // 4))
    middle = round(math.sqrt(first * top))
    return tuple(sorted({first, middle, top}, reverse=True))


def default_rounds(num_images: int) -> int:
    """Rounds of resampling: three for a folder of pictures, ten beyond ``SMALL_POOL``."""
    return 3 if num_images <= SMALL_POOL else 10


def levels_of(text: str) -> tuple[int, ...]:
    """The levels of an option, such as ``1000,500,250``.

    Raises:
        RecipeError: they are not numbers above 0.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise RecipeError(
            f"--levels {text}: not numbers above 0", fix="Write --levels 1000,500,250."
        )
    return tuple(int(part) for part in parts)


def check_levels(levels: tuple[int, ...], num_images: int) -> None:
    """Refuses levels that do not decrease or have more clusters than images.

    Raises:
        DataError: names the level.
    """
    text = ",".join(map(str, levels))
    for below, above in zip((num_images + 1, *levels), levels, strict=False):
        if not 1 <= above < below:
            what = f"fewer than {below:,}" if below <= num_images else f"{num_images:,} at most"
            raise DataError(
                f"levels {text}: {above:,} clusters, where 1 or more and {what} can be",
                fix="Give clusters from the images up, such as --levels 1000,500,250, or leave --levels out.",
            )


def build(
    rows: Vectors, settings: Settings, folder: Path, progress: Fitted | None = None
) -> list[Level]:
    """The levels from the images up, read from ``folder`` where it has them and written there by the first rank.

    Raises:
        DataError: the folder holds a hierarchy of other rows or settings.
    """
    check_levels(settings.levels, rows.num_rows)
    store = _Store(folder, settings)
    store.open()
    levels: list[Level] = []
    inputs: Vectors = rows
    for index, k in enumerate(settings.levels):
        level = store.read(index)
        if level is None:
            level = _make_level(inputs, min(k, inputs.num_rows), index, settings, store, progress)
        levels.append(level)
        inputs = VectorsInMemory(level.centroids)
    return levels


def _make_level(
    inputs: Vectors,
    k: int,
    index: int,
    settings: Settings,
    store: "_Store",
    progress: Fitted | None,
) -> Level:
    sample = _sample(inputs, k, (settings.seed, index))
    closest = settings.closest or sample.num_rows // k // 2
    rounds = settings.rounds if closest > 1 else 0
    done, centroids = store.newest_fit(index, rounds)
    for fit_number in range(done, rounds + 1):
        chosen: Vectors = sample
        if centroids is not None:
            chosen = in_memory(sample, _closest(sample, centroids, closest))
        centroids = fit(
            chosen,
            min(k, chosen.num_rows),
            seed=(settings.seed, index, fit_number),
            iterations=ITERATIONS if fit_number else FIRST_ITERATIONS,
            spherical=settings.spherical,
        )
        store.keep_fit(index, fit_number, centroids)
        if progress:
            passed = sum(settings.rounds + 1 for _ in range(index)) + fit_number + 1
            progress(passed, len(settings.levels) * (settings.rounds + 1))
    assert centroids is not None
    found = assign(inputs, centroids)
    used, parents = np.unique(found.labels, return_inverse=True)
    level = Level(
        centroids[torch.from_numpy(used).long()], parents.astype(np.int32), found.distances
    )
    store.keep(index, level)
    return level


def _sample(inputs: Vectors, k: int, seed: tuple[int, ...]) -> Vectors:
    """The inputs, or so many of them by the seed as centroids need, in memory."""
    most = max(FIT_ON_AT_LEAST, ROWS_PER_CENTROID * k)
    if inputs.num_rows <= most:
        return inputs
    random = np.random.default_rng([*seed, 1])
    return in_memory(inputs, np.sort(random.choice(inputs.num_rows, most, replace=False)))


def _closest(rows: Vectors, centroids: Tensor, count: int) -> np.ndarray:
    """The numbers of the ``count`` rows of each cluster closest to its centroid, of equal ones the first, ascending."""
    found = assign(rows, centroids)
    order = np.lexsort((found.distances, found.labels))
    begins = np.searchsorted(found.labels[order], np.arange(len(centroids)))
    order_in_cluster = np.arange(len(order)) - begins[found.labels[order]]
    return np.sort(order[order_in_cluster < count])


@dataclass
class _Store:
    """The files of a hierarchy: one for each array, replaced at once; no pickled objects."""

    folder: Path
    settings: Settings
    _first: bool = field(default_factory=is_first_rank)

    def open(self) -> None:
        made_from = {**asdict(self.settings), "levels": list(self.settings.levels)}
        path = self.folder / MADE_FROM
        if self._first and not path.exists():
            make_folder(self.folder)
            write_json(path, made_from)
        self._wait()
        if json.loads(path.read_text(encoding="utf-8")) != made_from:
            raise DataError(
                f"{self.folder} holds clusters of other embeddings, levels or seed",
                fix="Name another folder, or remove it.",
            )

    def read(self, index: int) -> Level | None:
        paths = [self._path(index, what) for what in ("centroids", "parents", "distances")]
        if not all(path.exists() for path in paths):
            return None
        centroids, parents, distances = (np.load(path, allow_pickle=False) for path in paths)
        return Level(torch.from_numpy(centroids), parents, distances)

    def keep(self, index: int, level: Level) -> None:
        if self._first:
            write_array(self._path(index, "parents"), level.parents)
            write_array(self._path(index, "distances"), level.distances)
            write_array(self._path(index, "centroids"), level.centroids.numpy())
            for path in self.folder.glob(f"level-{index + 1}-fit-*.npy"):
                remove(path)
        self._wait()

    def newest_fit(self, index: int, rounds: int) -> tuple[int, Tensor | None]:
        """How many fits of a level are there, and the centroids of the last."""
        for fit_number in range(rounds, -1, -1):
            path = self._path(index, f"fit-{fit_number}")
            if path.exists():
                return fit_number + 1, torch.from_numpy(np.load(path, allow_pickle=False))
        return 0, None

    def keep_fit(self, index: int, fit_number: int, centroids: Tensor) -> None:
        if self._first:
            write_array(self._path(index, f"fit-{fit_number}"), centroids.numpy())
            remove(self._path(index, f"fit-{fit_number - 1}"))
        self._wait()

    def _path(self, index: int, what: str) -> Path:
        return self.folder / f"level-{index + 1}-{what}.npy"

    def _wait(self) -> None:
        if is_shared():
            dist.barrier()
