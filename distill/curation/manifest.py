"""A choice as one Parquet file that people and training read (``distill.data.manifest``)."""

import json
from pathlib import Path

from distill.curation.chosen import Chosen
from distill.data.manifest import write_manifest
from distill.errors import DataError


def save_manifest(folder: Path, path: Path) -> int:
    """Writes the manifest of a folder of chosen images, and returns its number of rows: all of the pool.

    ``clusters`` are those of each image from the images up, ``similarity`` is to the centroid, the seed or the twin.

    Raises:
        DataError: the folder holds no choice, or ``path`` lies in it or is no ``.parquet``; as ``write_manifest``.
    """
    if path.suffix != ".parquet" or path.absolute().parent == folder.absolute():
        raise DataError(
            f"{path}: not a .parquet file beside {folder}",
            fix=f"Write -o {folder.absolute().with_suffix('.parquet')}.",
        )
    chosen = Chosen.open(folder)
    count = len(chosen.pool)
    similarity, clusters = chosen.array("similarity"), chosen.array("clusters")
    reasons, twins = [None] * count, [None] * count
    alike = [None] * count if similarity is None else similarity.tolist()
    for each in chosen.dropped():
        row = each["row"]
        reasons[row], twins[row], alike[row] = (
            each[name] for name in ("reason", "duplicate_of", "similarity")
        )
    columns = {
        "reason": reasons,
        "duplicate_of": twins,
        "similarity": alike,
        "clusters": [None] * count if clusters is None else clusters.T.tolist(),
    }
    write_manifest(path, chosen.pool, chosen.times, columns, json.dumps(dict(chosen.facts)))
    return count
