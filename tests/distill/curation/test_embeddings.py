"""Embeddings in a folder, and a part chosen by them, from the command line."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from distill.curation.choice import choose
from distill.curation.curate import CurationTarget
from distill.curation.embeddings import Features, StoredEmbeddings
from distill.data.build_index import build_index
from distill.data.split import split
from distill.errors import DataError
from tests.support.command import Run
from tests.support.heap import SHARD_ROWS, embedded, make_heap, use_small_shards, write_features


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_heap(tmp_path_factory.mktemp("heap"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_shards(monkeypatch)


def test_curate__writes_a_source_that_training_reads_the_same_bytes_every_time(
    made: tuple[Path, Path], tmp_path: Path, distill: Run
) -> None:
    heap, network = made
    assert distill("data", "embed", heap, "--with", network, "-o", tmp_path / "emb").code == 0
    words = ("data", "curate", tmp_path / "emb", "--target", 9, "--levels", "6,3", "--seed", 3)
    written = []
    for name in ("a", "b"):
        shown = distill(*words, "-o", tmp_path / name, "--json")
        assert shown.code == 0 and json.loads(shown.out)["chosen"] == 9
        files = [p for p in sorted((tmp_path / name).rglob("*")) if p.is_file()]
        written.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
    assert written[0] == written[1]
    chosen = build_index([tmp_path / "a"], max_bad_fraction=0.0)
    assert len(chosen) == 9 and chosen.class_names == ("blue", "green", "red")
    times = np.load(tmp_path / "a" / "times.npy")
    index = build_index([heap], max_bad_fraction=0.0)
    assert [str(chosen.location(i)) for i in range(9)] == [
        str(index.location(int(i))) for i in np.flatnonzero(times)
    ]
    assert distill("data", "check", tmp_path / "a").code == 0
    other = distill(*words[:-1], 4, "-o", tmp_path / "a")
    assert other.code == 0 or "seed" in other.err


def test_curate__of_what_folders_hold_out_nothing_is_trained_on(
    made: tuple[Path, Path], tmp_path: Path, distill: Run
) -> None:
    heap = tmp_path / "heap"
    shutil.copytree(made[0], heap / "train")
    shutil.copytree(made[0], heap / "val")
    assert distill("data", "embed", heap, "--with", made[1], "-o", tmp_path / "emb").code == 0
    words = ("data", "curate", tmp_path / "emb", "--target", 30, "--levels", "6,3")
    assert distill(*words, "-o", tmp_path / "chosen").code == 0
    train, held_out = split(build_index([tmp_path / "chosen"], max_bad_fraction=0.0), 0.2)
    assert held_out is not None and len(train) + len(held_out) == 30
    for part, name in ((train, "train"), (held_out, "val")):
        paths = [Path(str(part.location(image))) for image in range(len(part))]
        assert {path.relative_to(heap).parts[0] for path in paths} == {name}


@pytest.mark.parametrize("damage", [b"", b"no array", "shape", "kind"])
def test_curate__a_damaged_shard_is_one_line(
    made: tuple[Path, Path], tmp_path: Path, distill: Run, damage: bytes | str
) -> None:
    embedded(*made, tmp_path / "emb")
    shard = tmp_path / "emb" / "features-00001.npy"
    if isinstance(damage, bytes):
        shard.write_bytes(damage)
    else:
        rows = 5 if damage == "shape" else SHARD_ROWS
        np.save(shard, np.zeros((rows, 16), np.float16 if damage == "shape" else np.float32))
    result = distill("data", "curate", tmp_path / "emb", "--target", 5, "-o", tmp_path / "chosen")
    assert result.code == 1 and "Remove it, and embed again." in result.err
    assert len(result.err.strip().splitlines()) == 2 and str(tmp_path / "emb") in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", 22), "a target of 22 of 21 images"),
        (("--target", 0), "a target of 0 of 21 images"),
        (("--target", 5, "--levels", "3,6"), "levels 3,6"),
        (("--target", 5, "--levels", "3,x"), "--levels 3,x: not numbers above 0"),
    ],
)
def test_curate__what_cannot_be_is_one_line(
    made: tuple[Path, Path], tmp_path: Path, distill: Run, words: tuple[object, ...], message: str
) -> None:
    embedded(*made, tmp_path / "emb")
    result = distill("data", "curate", tmp_path / "emb", *words, "-o", tmp_path / "chosen")
    assert result.code in (1, 2) and result.err.strip().startswith(message)
    assert not (tmp_path / "chosen" / "index").exists()


def test_curate__goes_on_with_no_clusters_of_other_features(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    heap, network = made
    target, first, second = CurationTarget(6, (4, 2)), tmp_path / "first", tmp_path / "second"
    for folder, features in zip((first, second), get_args(Features), strict=True):
        stored = embedded(heap, network, folder, features)
        values = np.random.default_rng(stored.width).normal(size=(stored.num_rows, stored.width))
        write_features(folder, values.astype(np.float16))
    choose(StoredEmbeddings.open(first), target, tmp_path / "out")
    with pytest.raises(DataError, match="holds clusters of other embeddings"):
        choose(StoredEmbeddings.open(second), target, tmp_path / "out")
