"""Features of a heap of pictures, on one rank or several, again after a stop."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.curation import embed as module
from distill.curation.embed import shard_rows
from distill.curation.embeddings import StoredEmbeddings
from distill.data.build_index import build_index
from distill.errors import DataError
from distill.protocols.images import Extracted
from distill.weights.load import load_backbone
from tests.support.command import Run
from tests.support.heap import embedded, make_heap, use_small_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_heap(tmp_path_factory.mktemp("heap"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_shards(monkeypatch)


def test_embed__rows_are_the_networks_features_in_the_order_of_the_index(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    heap, network = made
    found = embedded(heap, network, tmp_path / "emb")
    assert (found.num_rows, found.width, found.meta.size) == (21, 16, 16)
    assert sorted(path.name for path in (tmp_path / "emb").glob("*.npy")) == [
        "features-00000.npy",
        "features-00001.npy",
        "features-00002.npy",
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
    once = embedded(heap, network, tmp_path / "once")
    real = module._rows

    def killed(*arguments: object) -> torch.Tensor:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr(module, "_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded(heap, network, tmp_path / "twice")
    with pytest.raises(
        DataError, match=r"features-00001.npy is missing, embeddings are not complete"
    ):
        StoredEmbeddings.open(tmp_path / "twice")
    first = (tmp_path / "twice" / "features-00000.npy").stat().st_mtime_ns
    monkeypatch.setattr(module, "_rows", real)
    again = embedded(heap, network, tmp_path / "twice")
    assert (tmp_path / "twice" / "features-00000.npy").stat().st_mtime_ns == first
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


def test_embed__with_patches_a_row_has_their_mean_behind_the_class_feature(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = embedded(*made, tmp_path / "class")
    both = embedded(*made, tmp_path / "both", "class+patch")
    assert both.width == 2 * alone.width
    assert torch.equal(both.block(0, 21)[:, : alone.width], alone.block(0, 21))
    pixels = torch.from_numpy(np.array(Image.open(str(both.index.location(3))))).permute(2, 0, 1)
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.inference_mode():
        patches = load_backbone(made[1])[0](((pixels / 255 - mean) / std)[None]).patch_tokens
    found = both.block(3, 4)[:, alone.width :]
    torch.testing.assert_close(found, patches.mean(1), rtol=2e-3, atol=2e-3)


def test_embed__a_heap_that_changed_is_not_gone_on_with(
    made: tuple[Path, Path], tmp_path: Path, distill: Run
) -> None:
    heap = tmp_path / "heap"
    shutil.copytree(made[0], heap)
    found = embedded(heap, made[1], tmp_path / "emb")
    words = ("--target", 20, "--levels", "6,3", "-o", tmp_path / "chosen")
    assert distill("data", "curate", tmp_path / "emb", *words).code == 0
    chosen = build_index([tmp_path / "chosen"], max_bad_fraction=0.0)
    changed = Path(str(chosen.location(0)))
    changed.write_bytes(changed.read_bytes() + b"\0")
    bytes_now = changed.stat().st_size
    for command in (
        ("data", "embed", heap, "--with", made[1], "-o", tmp_path / "emb"),
        ("data", "curate", tmp_path / "emb", *words),
        ("data", "check", tmp_path / "chosen"),
    ):
        result = distill(*command)
        assert result.code == 1, result.out
        assert f"{changed} has {bytes_now:,} bytes, it had {bytes_now - 1:,}" in result.err
    changed.unlink()
    with pytest.raises(DataError, match=r"is gone, it had .*; 1 of 21 images lie in changed"):
        StoredEmbeddings.open(found.folder)


def test_embed__numbers_that_are_not_finite_are_refused_with_the_picture(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.extract_all

    def overflow(*arguments: Any, **named: Any) -> Extracted:
        found = real(*arguments, **named)
        with torch.inference_mode():
            found.class_token[2, 5] = 70_000.0  # fp16 ends at 65,504
        return found

    monkeypatch.setattr(module, "extract_all", overflow)
    with pytest.raises(DataError, match=r"network: the features of .*2.png are not finite in fp16"):
        embedded(*made, tmp_path / "emb")
    assert not list((tmp_path / "emb").glob("*.npy"))


def test_embed__without_a_network_names_the_quickstart(
    tmp_path: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = distill("data", "embed", ".", "-o", "emb")
    assert result.code == 2 and "distill train quickstart" in result.err


@pytest.mark.parametrize(
    ("rows", "shard"), [(10, 64), (65_536, 64), (10**6, 1024), (10**9, 16_384)]
)
def test_shard_rows__are_full_batches_of_a_thousandth_of_the_heap(rows: int, shard: int) -> None:
    assert shard_rows(rows) == shard


@pytest.mark.slow
def test_embed__ranks_write_the_bytes_of_one_process(
    made: tuple[Path, Path], tmp_path: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # ranks are other processes, with shards of 64 rows
    heap = tmp_path / "heap"
    for copy in range(7):
        shutil.copytree(made[0], heap / str(copy))

    def written(name: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "distill", "data", "embed", str(heap), "--json"]
        return subprocess.Popen(
            [*line, "--with", str(made[1]), "-o", str(tmp_path / name), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            text=True,
        )

    def files(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    alone = written("alone")
    assert json.loads(alone.communicate(timeout=120)[0])["embedded_now"] == 147
    local = written("local", "--ranks", "2")
    assert json.loads(local.communicate(timeout=120)[0])["usable"] == 147
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(port),
    }
    tasks = [
        written("slurm", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **slurm)
        for task in range(2)
    ]
    assert json.loads(tasks[0].communicate(timeout=120)[0])["usable"] == 147
    assert tasks[1].communicate(timeout=120)[0] == "" and not tasks[1].returncode
    assert files("alone") == files("local") == files("slurm")
    assert sum(name.startswith("features") for name in files("alone")) == 3
    for ranks in ("1", "2"):
        words = ("data", "curate", tmp_path / "alone", "--target", "40", "--levels", "20,8")
        assert distill(*words, "-o", tmp_path / f"by {ranks}", "--ranks", ranks).code == 0
    assert files("by 1") == files("by 2") and "choice.json" in files("by 1")
