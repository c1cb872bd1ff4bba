"""Numbers of a choice beside its pool and a random draw, counted by hand."""

from pathlib import Path

import numpy as np
from PIL import Image

from distill.curation.balance import evenness
from distill.curation.chosen import Chosen, write_chosen
from distill.curation.evidence import cluster_sizes, evidence_of
from distill.data.build_index import build_index
from tests.support.pictures import picture


def classes(folder: Path, counts: dict[str, int]) -> Path:
    """A folder of so many pictures of each class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(number, 16, 16)).save(folder / name / f"{number}.png")
    return folder


def test_evidence__counts_pool_choice_and_a_random_draw_from_the_same_pool(tmp_path: Path) -> None:
    index = build_index([classes(tmp_path / "in", {"a": 6, "b": 2})], max_bad_fraction=0.0)
    times = np.array([2, 0, 0, 0, 0, 0, 1, 1])
    clusters = np.array([[0, 0, 0, 0, 1, -1, 2, 2], [0, 0, 0, 0, 1, -1, 1, 1]], np.int32)
    arrays = {"clusters": clusters, "similarity": np.zeros(8, np.float32)}
    write_chosen(tmp_path / "out", index, times, {"by": "curate", "seed": 1}, arrays)
    found = evidence_of(Chosen.open(tmp_path / "out"))
    assert found.pool.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]  # one has no cluster
    assert found.random.sum() == 4 and (found.random <= found.pool).all()
    chosen, pool = found.facts(times), found.facts(found.pool)
    assert (chosen.images, chosen.classes, chosen.evenness) == (4, 2, 1.0)
    assert pool.evenness == evenness(np.array([0] * 5 + [1] * 2), 2) < 1
    assert chosen.largest == (2 / 4, 2 / 4) and pool.largest == (4 / 7, 4 / 7)
    assert cluster_sizes(clusters[0], times).tolist() == [2, 0, 2]


def test_evidence__without_labels_or_clusters_leaves_broken_ones_out(tmp_path: Path) -> None:
    index = build_index([classes(tmp_path, {"a": 4})], max_bad_fraction=0.0)
    dropped = [{"row": 1, "reason": "broken"}, {"row": 2, "reason": "exact"}]
    facts = {"by": "dedup", "dropped": {"broken": 1, "exact": 1}}
    write_chosen(tmp_path / "out", index, np.array([1, 0, 0, 1]), facts, {}, dropped)
    found = evidence_of(Chosen.open(tmp_path / "out"))
    numbers = found.facts(found.pool)
    assert found.pool.tolist() == [1, 0, 1, 1] and numbers.largest == ()
    assert numbers.evenness is None and numbers.classes is None
    assert found.random.sum() == 2 == found.chosen.times.sum()
    assert found.random.tolist() == evidence_of(Chosen.open(tmp_path / "out")).random.tolist()
    assert cluster_sizes(np.full(3, -1, np.int32), np.ones(3, np.int64)).tolist() == []
