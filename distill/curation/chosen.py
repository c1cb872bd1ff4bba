"""A folder of chosen images: a source that training reads, as a packed folder is one, and what it was chosen from.

index/              the chosen images: ``data.sources: [FOLDER]``
choice.json         how they were chosen, and fingerprints of what they were chosen from
pool/               all images that were looked at, in their order
times.npy           how often each image of the pool is chosen
dropped.jsonl       a line for each image that was dropped as a copy: why, its twin, their similarity
similarity.npy      of each image of the pool, where it was chosen by that
clusters.npy        the clusters of each image of the pool, from the images up, where ``curate`` chose it
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from distill.curation.rows import write_array
from distill.data.index import ImageIndex
from distill.errors import DataError
from distill.listing.sources import INDEX_FOLDER
from distill.runfolder.files import make_folder, replace_text
from distill.runfolder.status import write_json

CHOICE, POOL, DROPPED, PAGE = "choice.json", "pool", "dropped.jsonl", "report.html"
SEEDS, AVOIDED, CLUSTERS = "seeds", "avoid", "clusters"  # folders that some verbs keep
ARRAYS = {"times.npy", "similarity.npy", "clusters.npy"}
ENTRIES = ARRAYS | {CHOICE, POOL, DROPPED, PAGE, INDEX_FOLDER, SEEDS, AVOIDED, CLUSTERS}
FORMAT = 1


@dataclass(frozen=True)
class Chosen:
    """What such a folder holds; arrays have a row for each image of the pool."""

    folder: Path
    facts: Mapping[str, Any]
    pool: ImageIndex
    times: Int64[np.ndarray, " images"]

    @staticmethod
    def open(folder: Path) -> "Chosen":
        """Reads a folder.

        Raises:
            DataError: it holds no choice, or a damaged one.
        """
        if not (folder / CHOICE).is_file():
            fix = "Name a folder that distill data dedup, curate or retrieve wrote."
            raise DataError(f"{folder}: no chosen images", fix=fix)
        try:
            facts = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
            times = np.load(folder / "times.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "Remove the folder, and choose again."
            raise DataError(f"{folder}: cannot be read ({error})", fix=fix) from error
        return Chosen(folder, facts, ImageIndex.load(folder / POOL), times)

    def array(self, name: str) -> np.ndarray | None:
        """An array of the folder; None where it has none of that name."""
        path = self.folder / f"{name}.npy"
        return np.load(path, allow_pickle=False) if path.is_file() else None

    def dropped(self) -> list[dict[str, Any]]:
        """Images that were dropped as copies, by row."""
        path = self.folder / DROPPED
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]


def require_free(folder: Path, by: str) -> None:
    """Refuses to write into a folder with anything but a choice ``by`` the same verb, complete or not.

    Raises:
        DataError: there is something else.
    """
    others = sorted({path.name for path in folder.glob("[!.]*")} - ENTRIES)
    before = Chosen.open(folder).facts["by"] if (folder / CHOICE).is_file() else by
    if others or folder.is_file() or before != by:
        has = others[0] if others else f"a choice by data {before}" if before != by else "a file"
        raise DataError(
            f"{folder}: is there already ({has})", fix="Name another with -o, or remove it."
        )


def write_chosen(
    folder: Path,
    pool: ImageIndex,
    times: Int64[np.ndarray, " images"],
    facts: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    dropped: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes the folder, and returns what ``choice.json`` holds; that comes last, so that what has one is complete."""
    make_folder(folder)
    for name, values in ({"times": times} | dict(arrays)).items():
        write_array(folder / f"{name}.npy", values)
    if dropped is not None:
        lines = [json.dumps(dict(each), ensure_ascii=True) + "\n" for each in dropped]
        replace_text(folder / DROPPED, "".join(lines))
    pool.save(folder / POOL)
    images = np.repeat(np.arange(len(pool), dtype=np.int64), times)
    pool.subset(images).save(folder / INDEX_FOLDER)
    choice = {"format": FORMAT, **facts, "chosen": len(images)}
    write_json(folder / CHOICE, choice)
    return choice
