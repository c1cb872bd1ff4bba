"""Images of a pool that are like some others, the seeds: of each seed the nearest by cosine, every pair compared; or from the clusters in which seeds lie.

Images that are like those of an evaluation set can be left out, and copies of the seeds. DINOv2 (arXiv 2304.07193, appendix A)
takes 4 for each seed, and leaves out what has a cosine above 0.45 to an evaluation image.

One product of pool and seeds, in blocks of BLOCK_ROWS x SEED_ROWS; the seeds are in memory in fp32. No communication.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from distill.curation.choice import chosen_before
from distill.curation.chosen import AVOIDED, SEEDS, Chosen, require_free, write_chosen
from distill.curation.curate import UnitVectors, check_lengths
from distill.curation.embed import EmbedRequest, embed
from distill.curation.embeddings import StoredEmbeddings, read_meta
from distill.curation.rows import BLOCK_ROWS
from distill.errors import DataError

SEED_ROWS = 8192  # of a product
NONE = -2.0  # below every cosine
Progress = Callable[[int, int], None]  # images done, of how many


@dataclass(frozen=True)
class Retrieval:
    """What to retrieve: cosines are those to a seed, ``above`` is that to an image to avoid.

    Attributes:
        per_seed: Images for each seed, at most; one that several seeds ask for is taken once.
        least: Images below it are not taken.
        most: Images above it to any seed are copies of that one, and not taken.
        above: Images above it to any image to avoid are not taken.
    """

    per_seed: int = 4
    least: float = -1.0
    most: float = 1.1
    above: float = 0.45


@dataclass(frozen=True)
class Sought:
    """Pictures to look for and pictures to avoid: sources, embedded by ``network``, or folders of embeddings; ``clusters``: a choice by ``curate`` from the same images, from whose first clusters to take."""

    seeds: Path
    avoid: Path | None = None
    network: Path | None = None
    clusters: Path | None = None


@dataclass(frozen=True)
class Retrieved:
    """Rows of the pool that seeds ask for, ascending, and the nearest of each seed; of every row the highest cosine to a seed, and to an image to avoid."""

    rows: Int64[np.ndarray, " retrieved"]
    nearest: Int64[np.ndarray, " seeds"]
    similarity: Float[np.ndarray, " images"]
    avoided: Float[np.ndarray, " images"]


def nearest(
    pool: UnitVectors,
    seeds: Float[Tensor, "seeds width"],
    avoid: Float[Tensor, "avoided width"],
    wanted: Retrieval,
    progress: Progress | None = None,
) -> Retrieved:
    """The ``per_seed`` nearest of each seed, of those that may be taken; vectors have length 1."""
    total = pool.num_rows
    similarity, avoided = torch.full((total,), NONE), torch.full((total,), NONE)
    best = torch.full((len(seeds), wanted.per_seed), NONE)
    rows = torch.zeros(len(seeds), wanted.per_seed, dtype=torch.int64)
    for begin in range(0, total, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, total)
        block = pool.block(begin, end)
        similarity[begin:end] = _highest(block, seeds)
        avoided[begin:end] = _highest(block, avoid)
        may_be_taken = (similarity[begin:end] <= wanted.most) & (avoided[begin:end] <= wanted.above)
        numbers = torch.arange(begin, end)
        for first in range(0, len(seeds), SEED_ROWS):
            part = slice(first, first + SEED_ROWS)
            cosines = (seeds[part] @ block.T).masked_fill(~may_be_taken, NONE)
            both = torch.cat([best[part], cosines], dim=1)
            best[part], at = both.topk(wanted.per_seed, dim=1)
            known = torch.cat([rows[part], numbers.expand(len(cosines), -1)], dim=1)
            rows[part] = known.gather(1, at)
        if progress:
            progress(end, total)
    taken = rows[best >= wanted.least]
    firsts = rows[:, 0][best[:, 0] >= wanted.least]
    return Retrieved(np.unique(taken.numpy()), firsts.numpy(), similarity.numpy(), avoided.numpy())


def from_clusters(
    found: Retrieved, clusters: Integer[np.ndarray, " images"], wanted: Retrieval
) -> Int64[np.ndarray, " retrieved"]:
    """Rows of the clusters of the seeds, ascending: of each ``per_seed`` times its seeds, those nearest to any seed.

    ``clusters`` has that of every row, -1 for none. A seed lies where the nearest image lies that may be taken.
    DINOv2 (arXiv 2304.07193, appendix A) draws from clusters at random.
    """
    able = (found.similarity <= wanted.most) & (found.avoided <= wanted.above)
    able &= found.similarity >= wanted.least
    of_seeds = clusters[found.nearest]
    taken = [np.zeros(0, np.int64)]
    for cluster, seeds in zip(*np.unique(of_seeds[of_seeds >= 0], return_counts=True), strict=True):
        rows = np.flatnonzero(able & (clusters == cluster))
        order = np.argsort(-found.similarity[rows], kind="stable")
        taken.append(rows[order[: seeds * wanted.per_seed]])
    return np.sort(np.concatenate(taken))


def _highest(
    block: Float[Tensor, "rows width"], others: Float[Tensor, "others width"]
) -> Float[Tensor, " rows"]:
    """The highest cosine of each row to any of the others; NONE without others."""
    found = torch.full((len(block),), NONE)
    for part in others.split(SEED_ROWS):
        if len(part):
            found = torch.maximum(found, (block @ part.T).max(dim=1).values)
    return found


def retrieve(
    embeddings: Path,
    sought: Sought,
    folder: Path,
    wanted: Retrieval,
    *,
    say: Callable[[str], None],
    among: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a folder of chosen images (``distill.curation.chosen``) with the images like the seeds, and returns what ``choice.json`` holds.

    Args:
        embeddings: those of the pool.
        sought: the seeds, and what to avoid.
        folder: where the choice lies.
        wanted: how many, and how near.
        say: gets what is next while pictures are embedded.
        among: a folder of images chosen from the same ones: others are not taken.
        progress: gets images compared, of how many.

    Raises:
        DataError: embeddings by another network, none that can be used, or nothing is like the seeds.
    """
    require_free(folder, "retrieve")
    of_pool = StoredEmbeddings.open(embeddings)
    seeds = _embeddings_of(sought.seeds, of_pool, sought.network, folder / SEEDS, say)
    avoid = None
    if sought.avoid is not None:
        avoid = _embeddings_of(sought.avoid, of_pool, sought.network, folder / AVOIDED, say)
    usable = of_pool.usable() & (True if among is None else chosen_before(of_pool, among))
    pool = np.flatnonzero(usable)
    vectors = UnitVectors(of_pool, pool)
    check_lengths(vectors, pool)
    unwanted = torch.zeros(0, of_pool.width) if avoid is None else _unit(avoid, of_pool)
    found = nearest(vectors, _unit(seeds, of_pool), unwanted, wanted, progress)
    rows = found.rows
    if clusters := sought.clusters:
        rows = from_clusters(found, _clusters_of(of_pool, clusters)[pool], wanted)
    if not len(rows):
        highest = found.similarity.max(initial=NONE)
        raise DataError(
            f"{embeddings}: none of {len(pool):,} images may be taken; the highest cosine to a seed is {highest:.3f}",
            fix="Give other limits, or other seeds.",
        )
    times, similarity = np.zeros(len(usable), np.int64), np.zeros(len(usable), np.float32)
    times[pool[rows]] = 1
    similarity[pool] = found.similarity
    facts = {
        "by": "retrieve",
        **asdict(wanted),
        "embeddings": asdict(of_pool.meta),
        "seeds": asdict(seeds.meta),
        "clusters": None if sought.clusters is None else str(sought.clusters.absolute()),
        "avoid": None if avoid is None else asdict(avoid.meta),
        "pool": len(pool),
        "avoided": int((found.avoided > wanted.above).sum()),
    }
    return write_chosen(folder, of_pool.index, times, facts, {"similarity": similarity})


def _clusters_of(pool: StoredEmbeddings, folder: Path) -> Integer[np.ndarray, " images"]:
    """The cluster of every image on the first level; -1 for none."""
    chosen_before(pool, folder)  # from the same images
    clusters = Chosen.open(folder).array("clusters")
    if clusters is None:
        fix = "Name a folder that distill data curate wrote."
        raise DataError(f"{folder}: a choice without clusters", fix=fix)
    return clusters[0]


def _embeddings_of(
    source: Path,
    pool: StoredEmbeddings,
    network: Path | None,
    folder: Path,
    say: Callable[[str], None],
) -> StoredEmbeddings:
    """A folder of embeddings as it is; pictures are embedded into ``folder`` as those of the pool were, and go on there after a stop."""
    if read_meta(source) is not None:
        return StoredEmbeddings.open(source)
    if network is None:
        raise DataError(
            f"{source}: no embeddings", fix=f"Name the network of {pool.folder}: --with NETWORK."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meta = pool.meta
    embed(EmbedRequest((source,), network, folder, meta.size, meta.features), say, device)
    return StoredEmbeddings.open(folder)


def _unit(some: StoredEmbeddings, pool: StoredEmbeddings) -> Float[Tensor, "rows width"]:
    """All usable rows, of length 1."""
    theirs, ours = (each.meta for each in (some, pool))
    names = ("weights", "size", "features")
    other = [name for name in names if getattr(theirs, name) != getattr(ours, name)]
    if other:
        raise DataError(
            f"{some.folder}: embeddings by {theirs.network} at {theirs.size} px, {theirs.features}; {pool.folder} has other {', '.join(other)} ({ours.network}, {ours.size} px, {ours.features})",
            fix=f"Embed both alike: distill data embed SRC -o FOLDER --with NETWORK --size {ours.size} --features {ours.features}.",
        )
    rows = np.flatnonzero(some.usable())
    if not len(rows):
        raise DataError(f"{some.folder}: no picture that can be used", fix="Give other pictures.")
    vectors = UnitVectors(some, rows)
    check_lengths(vectors, rows)
    return vectors.block(0, len(rows))
