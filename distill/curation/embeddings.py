"""Embeddings of images in a folder: features of one network, row by row with the index of the images.

    meta.json                   network, side in px, kind of features, rows, width, fingerprints
    index/                      the images (``distill.data.index``): image i is row i
    features-00000.npy, ...     ``shard_rows`` rows each, fp16; a picture that cannot be used has a row of zeros

``distill.curation.embed`` writes them. A shard gets its name when it is complete, so the same command goes on after a kill.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.data.file_sizes import refuse_changed
from distill.data.index import ImageIndex
from distill.errors import DataError
from distill.listing.sources import INDEX_FOLDER

META = "meta.json"
FORMAT = 2
Features = Literal["class", "class+patch"]


@dataclass(frozen=True)
class Meta:
    """What embeddings are of: a network by the fingerprint of its weights, images by that of their index.

    ``features``: the class feature, or with the mean of the patch features behind it.
    """

    network: str
    weights: str
    size: int
    features: Features
    width: int
    rows: int
    shard_rows: int
    images: str
    sources: tuple[str, ...]
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Files of features."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(self.rows)[shard * self.shard_rows : (shard + 1) * self.shard_rows]


@dataclass(frozen=True)
class StoredEmbeddings:
    """Complete embeddings, read from disk; satisfies ``Vectors``."""

    folder: Path
    meta: Meta
    index: ImageIndex

    @staticmethod
    def open(folder: Path) -> "StoredEmbeddings":
        """Finds the embeddings of a folder; rows are read when they are wanted.

        Raises:
            DataError: it holds no embeddings, not all of them yet, or of images that have changed.
        """
        meta = read_meta(folder)
        if meta is None:
            fix = "Make them: distill data embed SRC -o FOLDER --with NETWORK."
            raise DataError(f"{folder}: no embeddings", fix=fix)
        for shard in range(meta.num_shards):
            _require_shard(shard_path(folder, shard), (len(meta.rows_of(shard)), meta.width))
        index = ImageIndex.load(folder / INDEX_FOLDER)
        refuse_changed(index, folder, "Bring back what it was, or embed into another folder.")
        return StoredEmbeddings(folder, meta, index)

    @property
    def num_rows(self) -> int:
        """Images."""
        return self.meta.rows

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.meta.width

    def block(self, begin: int, end: int) -> Float[Tensor, "rows width"]:
        """Rows from ``begin`` to before ``end`` in fp32, as the network gave them."""
        parts = [torch.zeros(0, self.width)]
        size = self.meta.shard_rows
        for shard in range(begin // size, -(-end // size)):
            first = shard * size
            inside = _map(shard_path(self.folder, shard))[max(begin - first, 0) : end - first]
            parts.append(torch.from_numpy(inside.astype(np.float32)))
        return torch.cat(parts)

    def usable(self) -> Bool[np.ndarray, " images"]:
        """Images with features: those that could be decoded."""
        found = [
            np.abs(_map(shard_path(self.folder, shard))).max(axis=1, initial=0) > 0
            for shard in range(self.meta.num_shards)
        ]
        return np.concatenate(found) if found else np.zeros(0, np.bool_)


def shard_path(folder: Path, shard: int) -> Path:
    """Where the features of a shard lie."""
    return folder / f"features-{shard:05d}.npy"


def _map(path: Path) -> np.ndarray:
    """A shard, mapped for the moment only: there may be more than a process may have open."""
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _require_shard(path: Path, shape: tuple[int, int]) -> None:
    if not path.is_file():
        raise DataError(
            f"{path.parent}: {path.name} is missing, embeddings are not complete",
            fix="Run the same distill data embed again, which goes on.",
        )
    try:
        shard = _map(path)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", fix="Remove it, and embed again."
        ) from error
    if shard.shape != shape or shard.dtype != np.float16:
        raise DataError(
            f"{path}: {shard.dtype} numbers of shape {shard.shape}, not float16 of {shape}",
            fix="Remove it, and embed again.",
        )


def read_meta(folder: Path) -> Meta | None:
    """What a folder holds embeddings of; None where it holds none.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = folder / META
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        return Meta(**{**values, "sources": tuple(values["sources"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", fix="Remove the folder, and embed again."
        ) from error
