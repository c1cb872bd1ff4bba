"""A chosen part of embedded images, as a source that training reads: an index of them, and how they were chosen.

index/                        the chosen images, as in a packed folder: ``data.sources: [FOLDER]``
choice.json                   target, levels, seed, network, fingerprints
times.npy, clusters.npy, similarity.npy    of every embedded image, by row
clusters/                     centroids, kept while they are made
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from distill.curation.curate import Curated, CurationTarget, curate
from distill.curation.embeddings import StoredEmbeddings
from distill.curation.hierarchy import Fitted, default_levels
from distill.listing.sources import INDEX_FOLDER
from distill.runfolder.files import make_folder, replaced
from distill.runfolder.status import write_json

CHOICE = "choice.json"
CLUSTERS = "clusters"


def choose(
    embeddings: StoredEmbeddings,
    target: CurationTarget,
    folder: Path,
    progress: Fitted | None = None,
) -> Curated:
    """Chooses images and writes the folder; the same call goes on after a kill, and writes the same bytes.

    Raises:
        DataError: as ``curate``.
    """
    meta, pool = embeddings.meta, embeddings.usable()
    target = replace(target, made_from=f"{meta.weights} {meta.images} {meta.size}")
    make_folder(folder)
    found = curate(embeddings, target, folder / CLUSTERS, pool=pool, progress=progress)
    images = np.repeat(np.arange(meta.rows, dtype=np.int64), found.times)
    for name, values in (
        ("times", found.times),
        ("clusters", found.paths),
        ("similarity", found.similarity),
    ):
        with replaced(folder / f"{name}.npy") as aside, aside.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    levels = target.levels or default_levels(int(pool.sum()), target.target)
    facts = {
        "format": 1,
        **asdict(replace(target, levels=tuple(levels))),
        "embeddings": asdict(meta),
        "pool": int(pool.sum()),
        "chosen": len(images),
    }
    embeddings.index.subset(images).save(folder / INDEX_FOLDER)
    write_json(folder / CHOICE, facts)
    return found
