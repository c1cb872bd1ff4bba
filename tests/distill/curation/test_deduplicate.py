"""``distill data dedup``: a heap without its copies, as a source."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.curation.chosen import Chosen, require_free
from distill.curation.embeddings import StoredEmbeddings
from distill.data.build_index import build_index
from distill.errors import DataError
from tests.support.command import Run
from tests.support.heap import write_features
from tests.support.long_tail import judge, write_heap
from tests.support.scored_run import TINY_VIT, export


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "heap"
    assert write_heap(folder, seed=3, tile=192) == sum(1 for _ in folder.rglob("*.*"))
    return folder


def test_dedup__finds_the_copies_of_a_heap_and_writes_a_source(
    heap: Path, tmp_path: Path, distill: Run
) -> None:
    out = tmp_path / "once"
    result = distill("data", "dedup", heap, "-o", out, "--json")
    facts = json.loads(result.out)
    chosen = Chosen.open(out)
    assert facts["chosen"] == chosen.times.sum() < facts["pool"] == len(chosen.pool)
    assert facts["dropped"].keys() == {"exact", "perceptual", "cropped"}
    twins = np.full(len(chosen.pool), -1)
    for each in chosen.dropped():
        twins[each["row"]] = each["duplicate_of"]
        assert each["image"] == str(chosen.pool.location(each["row"]))
        assert each["twin"] == str(chosen.pool.location(each["duplicate_of"]))
        one, other = Path(each["image"]).read_bytes(), Path(each["twin"]).read_bytes()
        assert (one == other) == (each["reason"] == "exact")
    paths = [str(chosen.pool.location(row)) for row in range(len(chosen.pool))]
    evidence = judge(paths, twins.tolist())
    assert evidence["exact"].share == 1.0 and evidence["exact"].of > 12
    assert evidence["encoded"].share >= 0.95 and evidence["encoded"].of > 12
    assert evidence["cropped"].share >= 0.7 and evidence["cropped"].of > 12
    assert evidence["precision"].share >= 0.98
    trained_on = build_index([out], max_bad_fraction=0.0)
    kept = [path for path, times in zip(paths, chosen.times, strict=True) if times]
    assert [str(trained_on.location(row)) for row in range(len(trained_on))] == kept
    assert distill("data", "check", out).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    (out / "choice.json").unlink()  # as after a kill
    assert distill("data", "dedup", heap, "-o", out).code == 0
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_dedup__writes_into_no_folder_of_something_else(
    heap: Path, tmp_path: Path, distill: Run
) -> None:
    moon = heap / "moon"
    refused = distill("data", "dedup", moon, "-o", moon)
    assert refused.code == 1 and f"{moon}: is there already (t0" in refused.err
    assert distill("data", "dedup", moon, "-o", tmp_path / "out").code == 0
    with pytest.raises(DataError, match=r"is there already \(a choice by data dedup\)"):
        require_free(tmp_path / "out", "curate")


def test_dedup__of_embeddings_has_three_tiers_and_curate_chooses_among_them(
    heap: Path, tmp_path: Path, distill: Run
) -> None:
    export(tmp_path / "network", TINY_VIT, 16)
    emb, kept, words = tmp_path / "emb", tmp_path / "kept", ("--with", tmp_path / "network")
    assert distill("data", "embed", heap / "retina", *words, "-o", emb).code == 0
    plain = distill("data", "dedup", emb, "-o", tmp_path / "plain", "--json")
    rows = np.flatnonzero(Chosen.open(tmp_path / "plain").times)
    meta = StoredEmbeddings.open(emb).meta
    features = np.random.default_rng(0).normal(size=(meta.rows, meta.width)).astype(np.float16)
    features[rows[4]] = features[rows[1]] * 2  # the same direction: a copy by features alone
    write_features(emb, features)
    found = distill("data", "dedup", emb, "--semantic", 0.01, "-o", kept, "--json")
    counts = json.loads(plain.out)["dropped"] | {"semantic": 1}
    assert found.code == 0 and json.loads(found.out)["dropped"] == counts
    (semantic,) = [each for each in Chosen.open(kept).dropped() if each["reason"] == "semantic"]
    assert {semantic["row"], semantic["duplicate_of"]} == {rows[1], rows[4]}
    before = Chosen.open(kept)
    curate = ("data", "curate", emb, "--target", 9, "--levels", "4,2", "--among")
    assert distill(*curate, kept, "-o", tmp_path / "chosen").code == 0
    times = Chosen.open(tmp_path / "chosen").times
    assert times.sum() == 9 and (before.times[times > 0] == 1).all()
    assert distill("data", "dedup", heap / "moon", "-o", tmp_path / "other").code == 0
    refused = distill(*curate, tmp_path / "other", "-o", tmp_path / "none")
    assert refused.code == 1 and "chosen from other images" in refused.err


def test_dedup__a_source_that_changed_since_is_refused(
    heap: Path, tmp_path: Path, distill: Run
) -> None:
    shutil.copytree(heap / "moon", tmp_path / "moon")
    assert distill("data", "dedup", tmp_path / "moon", "-o", tmp_path / "out").code == 0
    kept = build_index([tmp_path / "out"], max_bad_fraction=0.0).location(0)
    with Path(str(kept)).open("ab") as file:
        file.write(b"more")
    refused = distill("data", "check", tmp_path / "out")
    assert refused.code == 1 and f"{kept} has" in refused.err


def test_dedup__semantic_copies_need_embeddings(heap: Path, tmp_path: Path, distill: Run) -> None:
    result = distill("data", "dedup", heap, "--semantic", 0.1, "-o", tmp_path / "out")
    assert result.code == 1 and "has no embeddings" in result.err and "data embed" in result.err
    assert not (tmp_path / "out").exists()


def test_chosen_open__names_what_is_no_choice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chosen images"):
        Chosen.open(tmp_path)
    (tmp_path / "choice.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="format 9, this version reads 1"):
        Chosen.open(tmp_path)
