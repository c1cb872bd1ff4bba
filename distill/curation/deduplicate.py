"""Images without their copies, as a folder that training reads."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.curation.chosen import require_free, write_chosen
from distill.curation.duplicates import Duplicates, find_copies, find_semantic_copies
from distill.curation.embed import MOST_BROKEN
from distill.curation.embeddings import StoredEmbeddings, read_meta
from distill.curation.hashes import Progress, hash_images
from distill.data.build_index import build_index
from distill.data.file_sizes import file_bytes
from distill.data.index import ImageIndex
from distill.errors import DataError

Bar = Callable[[str], Progress]  # takes what is counted


def deduplicate(
    sources: Sequence[Path], folder: Path, bar: Bar, *, hamming: int, eps: float | None = None
) -> dict[str, Any]:
    """Writes the folder, and returns counts: images, kept, and dropped by reason.

    Args:
        sources: folders, shards, lists or tables; or one folder of embeddings, whose images are taken.
        folder: where the choice lies.
        bar: gives what is called with images done, of how many.
        hamming: bits in which perceptual and cropped copies may differ.
        eps: of semantic copies, which need embeddings; None leaves them out.

    Raises:
        DataError: the folder has something else, semantic copies of images without embeddings, embeddings that are not finite.
    """
    require_free(folder, "dedup")
    embeddings = None
    if len(sources) == 1 and read_meta(sources[0]) is not None:
        embeddings = StoredEmbeddings.open(sources[0])
    if eps is not None and embeddings is None:
        raise DataError(
            f"--semantic {eps:g}: {sources[0]} has no embeddings",
            fix="Make them: distill data embed SRC -o EMB --with NETWORK; then distill data dedup EMB.",
        )
    if embeddings is None:
        index = build_index(sources, max_bad_fraction=MOST_BROKEN, progress=bar("listing"))
        index = replace(index, file_bytes=file_bytes(index))
    else:
        index = embeddings.index
    hashes = hash_images([index.location(i) for i in range(len(index))], bar("hashing"))
    pixels = np.asarray(index.hw, np.int64).prod(axis=1)
    found = find_copies(hashes, pixels, hamming)
    if embeddings is not None and eps is not None:
        sizes = pixels, hashes.num_bytes
        usable = embeddings.usable()
        find_semantic_copies(found, embeddings, eps, sizes, usable, bar("comparing"))
    counts = Counter(reason for reason in found.reasons if reason)
    facts = {
        "by": "dedup",
        "sources": [str(source.absolute()) for source in sources],
        "images": index.fingerprint,
        "hamming": hamming,
        "semantic": eps,
        "embeddings": None if embeddings is None else asdict(embeddings.meta),
        "pool": len(index),
        "dropped": dict(sorted(counts.items())),
    }
    times = np.array([not reason for reason in found.reasons], np.int64)
    return write_chosen(folder, index, times, facts, {}, _lines(found, index))


def _lines(found: Duplicates, index: ImageIndex) -> Iterator[dict[str, Any]]:
    for row, reason in enumerate(found.reasons):
        if reason:
            twin = int(found.twins[row])
            yield {
                "row": row,
                "image": str(index.location(row)),
                "reason": reason,
                "duplicate_of": twin if twin >= 0 else None,
                "twin": str(index.location(twin)) if twin >= 0 else None,
                "similarity": round(float(found.similarity[row]), 6),
            }
