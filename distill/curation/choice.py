"""A balanced choice of embedded images, as a folder of chosen images (``distill.curation.chosen``).

Beside what every such folder has there is ``clusters/``: centroids, kept while they are made.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from distill.curation.chosen import CLUSTERS, Chosen, require_free, write_chosen
from distill.curation.curate import CurationTarget, curate
from distill.curation.embeddings import StoredEmbeddings
from distill.curation.hierarchy import Fitted
from distill.curation.rows import is_first_rank
from distill.errors import DataError
from distill.protocols.sharing import Sharing
from distill.runfolder.files import make_folder
from distill.screen.counted import ProgressBar


def choose_on_rank(
    embeddings: Path,
    target: CurationTarget,
    folder: Path,
    among: Path | None,
    _device: torch.device,
    sharing: Sharing,
) -> dict[str, Any]:
    """As ``choose``, of a folder of embeddings; the first rank shows how far it is."""
    with ProgressBar("clusters") as bar:
        progress = bar if sharing.is_first else None
        return choose(StoredEmbeddings.open(embeddings), target, folder, progress, among)


def choose(
    embeddings: StoredEmbeddings,
    target: CurationTarget,
    folder: Path,
    progress: Fitted | None = None,
    among: Path | None = None,
) -> dict[str, Any]:
    """Chooses images and writes the folder; the same call goes on after a kill, and writes the same bytes.

    Collective over the ranks of the default group where there is one; the first writes. Any number gives the same bytes.

    ``among`` is a folder of images chosen from the same ones, such as those without copies: others are not chosen.

    Returns:
        What ``choice.json`` holds; nothing on other ranks.

    Raises:
        DataError: as ``curate``; ``among`` is of other images; the folder has something else.
    """
    require_free(folder, "curate")
    meta, pool = embeddings.meta, embeddings.usable()
    if among is not None:
        pool &= chosen_before(embeddings, among)
    target = replace(target, made_from=f"{meta.weights} {meta.images} {meta.size} {meta.features}")
    make_folder(folder)
    found = curate(embeddings, target, folder / CLUSTERS, pool=pool, progress=progress)
    if not is_first_rank():
        return {}
    facts = {
        "by": "curate",
        **asdict(replace(target, levels=found.levels)),
        "embeddings": asdict(meta),
        "pool": int(pool.sum()),
    }
    arrays = {"clusters": found.paths, "similarity": found.similarity}
    return write_chosen(folder, embeddings.index, found.times, facts, arrays)


def chosen_before(embeddings: StoredEmbeddings, folder: Path) -> Bool[np.ndarray, " images"]:
    """Which embedded images another choice from the same images has.

    Raises:
        DataError: the folder holds no choice, or one from other images.
    """
    before = Chosen.open(folder)
    if before.pool.fingerprint != embeddings.meta.images:
        raise DataError(
            f"{folder}: chosen from other images than {embeddings.folder} has",
            fix=f"Choose from the same: distill data dedup {embeddings.folder} -o FOLDER.",
        )
    return before.times > 0
