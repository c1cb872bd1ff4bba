"""A small heap of pictures, a network, and its embeddings in small shards."""

from pathlib import Path

import numpy as np
import pytest

from distill.curation import embed as module
from distill.curation.embed import EmbedRequest, embed
from distill.curation.embeddings import Features, StoredEmbeddings, shard_path
from tests.support.scored_run import CPU, TINY_VIT, export, write_splits

SHARD_ROWS = 8
WIDTH = 16


def make_heap(root: Path) -> tuple[Path, Path]:
    """Twenty-one pictures in three folders, and a network."""
    write_splits(root, (7, 1))
    export(root / "network", TINY_VIT, 16)
    return root / "train", root / "network"


def embedded(
    heap: Path, network: Path, folder: Path, features: Features = "class"
) -> StoredEmbeddings:
    """Embeds a heap on this process."""
    embed(EmbedRequest((heap,), network, folder, None, features), lambda _: None, CPU)
    return StoredEmbeddings.open(folder)


def use_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes shards of ``SHARD_ROWS`` rows."""
    monkeypatch.setattr(module, "shard_rows", lambda _: SHARD_ROWS)


def write_features(folder: Path, features: np.ndarray) -> None:
    """Puts other numbers into a folder of embeddings."""
    meta = StoredEmbeddings.open(folder).meta
    for shard in range(meta.num_shards):
        np.save(shard_path(folder, shard), features[list(meta.rows_of(shard))])
