"""Images like given ones, against every pair compared one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.curation import retrieve as module
from distill.curation.chosen import Chosen
from distill.curation.curate import UnitVectors
from distill.curation.embeddings import StoredEmbeddings
from distill.curation.retrieve import Retrieval, Retrieved, from_clusters, nearest
from distill.curation.rows import VectorsInMemory
from distill.data.build_index import build_index
from tests.support.command import Run
from tests.support.heap import write_features
from tests.support.scored_run import TINY_VIT, export, write_splits


def test_nearest__equals_the_nested_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pool, seeds, avoid = (
        torch.nn.functional.normalize(torch.randn(count, 6), dim=1) for count in (100, 30, 5)
    )
    pool[17] = seeds[3]  # a copy of a seed
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(module, "SEED_ROWS", 8)
    wanted = Retrieval(per_seed=3, least=0.7, most=0.99, above=0.8)
    counted: list[tuple[int, int]] = []
    found = nearest(
        UnitVectors(VectorsInMemory(pool)),
        seeds,
        avoid,
        wanted,
        lambda *each: counted.append(each),
    )
    to_seed, to_avoided = pool @ seeds.T, pool @ avoid.T
    expected = set[int]()
    for each in range(30):
        order = sorted(range(100), key=lambda row: -float(to_seed[row, each]))
        able = [row for row in order if to_avoided[row].max() <= 0.8 and to_seed[row].max() <= 0.99]
        expected |= {row for row in able[:3] if to_seed[row, each] >= 0.7}
    assert found.rows.tolist() == sorted(expected) and 20 < len(expected) < 90
    assert to_avoided.max(dim=1).values[list(expected)].max() < to_avoided.max()
    torch.testing.assert_close(torch.from_numpy(found.similarity), to_seed.max(dim=1).values)
    torch.testing.assert_close(torch.from_numpy(found.avoided), to_avoided.max(dim=1).values)
    assert counted[-1] == (100, 100)


def test_from_clusters__takes_the_nearest_of_the_clusters_that_seeds_lie_in() -> None:
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, -1])
    similarity = np.array([0.1, 0.9, 0.5, 0.7, 0.2, 0.99, 0.3, 0.8, 0.8, 0.95], np.float32)
    avoided = np.zeros(10, np.float32)
    avoided[3] = 0.6
    found = Retrieved(np.array([1]), np.array([1, 2, 6, 9]), similarity, avoided)
    rows = from_clusters(found, clusters, Retrieval(per_seed=1, most=0.98, above=0.5))
    assert rows.tolist() == [1, 2, 6]  # two of the first; of the second a copy is left out
    rows = from_clusters(found, clusters, Retrieval(per_seed=2, least=0.25, above=0.5))
    assert rows.tolist() == [1, 2, 5, 6]


def test_retrieve__is_a_source_of_the_nearest_and_embeds_pictures_as_the_pool_was(
    tmp_path: Path, distill: Run
) -> None:
    write_splits(tmp_path, (12, 2))
    export(tmp_path / "network", TINY_VIT, 16)
    emb, out, network = tmp_path / "emb", tmp_path / "out", ("--with", tmp_path / "network")
    assert distill("data", "embed", tmp_path / "train", *network, "-o", emb).code == 0
    words = ("data", "retrieve", emb, "--per-seed", 1, "--json", "-o")
    pictures = ("--seed", tmp_path / "held_out" / "red")
    refused = distill(*words, out, *pictures)
    assert refused.code == 1 and "red: no embeddings" in refused.err and "--with" in refused.err
    assert not out.exists()
    assert distill(*words, out, *pictures, *network).code == 0
    assert StoredEmbeddings.open(out / "seeds").num_rows == 2
    features = np.random.default_rng(0).normal(size=(36, 16)).astype(np.float16)
    write_features(emb, features)
    write_features(out / "seeds", features[[30, 5]] * 2)  # the same directions
    seeds = ("--seed", out / "seeds")
    facts = json.loads(distill(*words, tmp_path / "a", *seeds).out)
    assert (facts["chosen"], facts["pool"], facts["avoided"]) == (2, 36, 0)
    chosen, found = Chosen.open(tmp_path / "a"), build_index([tmp_path / "a"], max_bad_fraction=0.0)
    assert np.flatnonzero(chosen.times).tolist() == [5, 30]
    assert [found.location(row) for row in range(2)] == [chosen.pool.location(r) for r in (5, 30)]
    similarity = chosen.array("similarity")
    assert similarity is not None and np.allclose(similarity[[5, 30]], 1, atol=1e-3)
    assert json.loads(distill(*words, tmp_path / "b", *seeds, "--most", 0.99).out)["chosen"] == 2
    assert not Chosen.open(tmp_path / "b").times[[5, 30]].any()
    avoiding = ("--not-like", out / "seeds", "--above", 0.99)
    assert json.loads(distill(*words, tmp_path / "c", *seeds, *avoiding).out)["avoided"] == 2
    curated = tmp_path / "curated"
    assert (
        distill("data", "curate", emb, "--target", 12, "--levels", "4,2", "-o", curated).code == 0
    )
    assert distill(*words, tmp_path / "d", *seeds, "--cluster", curated).code == 0
    clusters = Chosen.open(curated).array("clusters")
    assert clusters is not None
    taken = np.flatnonzero(Chosen.open(tmp_path / "d").times)
    assert set(clusters[0][taken]) == set(clusters[0][[5, 30]]) and {5, 30} <= set(taken)
    other = distill(*words, tmp_path / "e", *seeds, "--cluster", tmp_path / "a")
    assert other.code == 1 and "a choice without clusters" in other.err
    among = distill(*words, tmp_path / "d", *seeds, "--among", tmp_path / "a", "--per-seed", 9)
    assert json.loads(among.out)["pool"] == json.loads(among.out)["chosen"] == 2


def test_retrieve__refuses_another_network_and_limits_that_nothing_meets(
    tmp_path: Path, distill: Run
) -> None:
    write_splits(tmp_path, (3, 2))
    export(tmp_path / "network", TINY_VIT, 16)
    export(tmp_path / "wide", TINY_VIT, 32)
    embed = ("data", "embed", tmp_path / "train", "--with")
    assert distill(*embed, tmp_path / "network", "-o", tmp_path / "emb").code == 0
    assert distill(*embed, tmp_path / "wide", "-o", tmp_path / "other").code == 0
    words = ("data", "retrieve", tmp_path / "emb", "-o", tmp_path / "out", "--seed")
    other = distill(*words, tmp_path / "other")
    assert other.code == 1 and "has other size (network, 16 px, class)" in other.err
    assert "--size 16 --features class" in other.err
    none = distill(*words, tmp_path / "emb", "--most", -0.5)
    assert none.code == 1 and "none of 9 images may be taken" in none.err
    assert "the highest cosine to a seed is 1.000" in none.err
    assert not (tmp_path / "out").exists()
