"""StoredEmbeddings in a folder, and a part chosen by them, from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.curation import embeddings as module
from distill.curation.embeddings import StoredEmbeddings, embed
from distill.data.build_index import build_index
from distill.data.split import split
from distill.errors import DataError
from distill.weights.load import load_backbone
from tests.support.command import Run
from tests.support.scored_run import CPU, TINY_VIT, export, write_splits

SHARD_ROWS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twenty-one pictures in three folders, and a network."""
    root = tmp_path_factory.mktemp("heap")
    write_splits(root, (7, 1))
    export(root / "network", TINY_VIT, 16)
    return root / "train", root / "network"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", SHARD_ROWS)


def silent(_: str) -> None:
    """Progress that nobody reads."""


def test_embed__rows_are_the_networks_features_in_the_order_of_the_index(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    heap, network = made
    found = embed([heap], network, tmp_path / "emb", silent, device=CPU)
    assert (found.num_rows, found.width, found.meta.size) == (21, 16, 16)
    assert sorted(path.name for path in (tmp_path / "emb").glob("*.npy")) == [
        "class-00000.npy",
        "class-00001.npy",
        "class-00002.npy",
    ]
    index = build_index([heap], max_bad_fraction=0.0)
    assert found.index.fingerprint == index.fingerprint
    pixels = [np.asarray(Image.open(str(index.location(image)))) for image in range(21)]
    backbone = load_backbone(network)[0]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.inference_mode():
        wanted = backbone((images - mean) / std).class_token
    torch.testing.assert_close(found.block(0, 21), wanted, rtol=2e-3, atol=2e-3)
    assert torch.equal(found.block(5, 18), found.block(0, 21)[5:18])
    assert found.usable().all()


def test_embed__goes_on_with_the_shards_that_are_missing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap, network = made
    once = embed([heap], network, tmp_path / "once", silent, device=CPU)
    real = module._features

    def killed(*arguments: object) -> torch.Tensor:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr(module, "_features", killed)
    with pytest.raises(KeyboardInterrupt):
        embed([heap], network, tmp_path / "twice", silent, device=CPU)
    with pytest.raises(DataError, match=r"class-00001.npy is missing, embeddings are not complete"):
        StoredEmbeddings.open(tmp_path / "twice")
    first = (tmp_path / "twice" / "class-00000.npy").stat().st_mtime_ns
    monkeypatch.setattr(module, "_features", real)
    again = embed([heap], network, tmp_path / "twice", silent, device=CPU)
    assert (tmp_path / "twice" / "class-00000.npy").stat().st_mtime_ns == first
    assert torch.equal(again.block(0, 21), once.block(0, 21))


def test_embed__a_picture_that_is_gone_has_a_row_of_zeros_and_is_not_chosen(
    made: tuple[Path, Path], tmp_path: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap = tmp_path / "heap"
    shutil.copytree(made[0], heap)
    index = build_index([heap], max_bad_fraction=0.0)
    gone = Path(str(index.location(4)))
    monkeypatch.setattr(module, "build_index", lambda *_, **__: index)
    gone.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    result = distill("data", "embed", heap, "--with", made[1], "-o", tmp_path / "emb")
    assert result.code == 0 and "21 images in" in result.out
    assert "1 of them cannot be decoded" in result.out
    found = StoredEmbeddings.open(tmp_path / "emb")
    assert np.flatnonzero(~found.usable()).tolist() == [4] and found.block(4, 5).abs().sum() == 0
    words = ("data", "curate", tmp_path / "emb", "--target", 20, "--levels", "6,3")
    assert distill(*words, "-o", tmp_path / "chosen").code == 0
    times = np.load(tmp_path / "chosen" / "times.npy")
    assert times[4] == 0 and times.sum() == 20


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
    embed([made[0]], made[1], tmp_path / "emb", silent, device=CPU)
    shard = tmp_path / "emb" / "class-00001.npy"
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
    embed([made[0]], made[1], tmp_path / "emb", silent, device=CPU)
    result = distill("data", "curate", tmp_path / "emb", *words, "-o", tmp_path / "chosen")
    assert result.code in (1, 2) and result.err.strip().startswith(message)
    assert not (tmp_path / "chosen" / "index").exists()


def test_embed__other_weights_sizes_and_sources_are_refused(
    made: tuple[Path, Path], tmp_path: Path, distill: Run
) -> None:
    heap, network = made
    out = ("-o", tmp_path / "emb")
    assert distill("data", "embed", heap, "--with", network, *out).code == 0
    for words, what in (
        ((heap, "--with", network, "--size", 24), "other --size"),
        ((heap.parent / "held_out", "--with", network), "other sources"),
    ):
        result = distill("data", "embed", *words, *out)
        assert result.code == 1 and f"has embeddings with {what}" in result.err
    result = distill("data", "embed", heap, "--with", network, "--size", 20, *out)
    assert "not a multiple of 8, the stride of network" in result.err
    result = distill("data", "curate", heap, "--target", 5, "-o", tmp_path / "x")
    assert "no embeddings" in result.err and "distill data embed" in result.err
