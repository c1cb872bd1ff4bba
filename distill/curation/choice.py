"""A chosen part of embedded images, as a source that training reads: an index of them, and how they were chosen.

index/                        the chosen images, as in a packed folder: ``data.sources: [FOLDER]``
choice.json                   target, levels, seed, network, fingerprints
times.npy, clusters.npy, similarity.npy    of every embedded image, by row
clusters/                     centroids, kept while they are made
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.curation.curate import CurationTarget, curate
from distill.curation.embeddings import StoredEmbeddings
from distill.curation.hierarchy import Fitted
from distill.curation.rows import write_array
from distill.listing.sources import INDEX_FOLDER
from distill.runfolder.files import make_folder
from distill.runfolder.status import write_json

CHOICE = "choice.json"
CLUSTERS = "clusters"


def choose(
    embeddings: StoredEmbeddings,
    target: CurationTarget,
    folder: Path,
    progress: Fitted | None = None,
) -> dict[str, Any]:
    """Chooses images and writes the folder; the same call goes on after a kill, and writes the same bytes.

    Returns:
        What ``choice.json`` holds.

    Raises:
        DataError: as ``curate``.
    """
    meta, pool = embeddings.meta, embeddings.usable()
    target = replace(target, made_from=f"{meta.weights} {meta.images} {meta.size}")
    make_folder(folder)
    found = curate(embeddings, target, folder / CLUSTERS, pool=pool, progress=progress)
    images = np.repeat(np.arange(meta.rows, dtype=np.int64), found.times)
    write_array(folder / "times.npy", found.times)
    write_array(folder / "clusters.npy", found.paths)
    write_array(folder / "similarity.npy", found.similarity)
    facts = {
        "format": 1,
        **asdict(replace(target, levels=found.levels)),
        "embeddings": asdict(meta),
        "pool": int(pool.sum()),
        "chosen": len(images),
    }
    embeddings.index.subset(images).save(folder / INDEX_FOLDER)
    write_json(folder / CHOICE, facts)
    return facts
