"""Images shared over ranks: every rank has what one process would have, bit for bit, and each image is decoded by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.evaluate.run import evaluate_run
from distill.protocols import sharing
from distill.protocols.images import Preparation, extract_all, read_split
from distill.protocols.sharing import Sharing, extract_shared, read_shared
from distill.weights.load import load_backbone
from tests.support.scored_run import CPU, MEAN, STD, scored, write_run, write_splits
from tests.support.spawn import on_ranks

BATCH = 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images to train on and six held out, one of which is broken; its index was made before."""
    folder = tmp_path_factory.mktemp("shared")
    run = tmp_path_factory.mktemp("run")
    write_run(run, write_splits(folder, (10, 3)))
    (folder / "held_out" / "green" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return run


def features(run: Path, mode: str) -> list[Any]:
    """Of the held-out images by the students, with pixels in memory, and decoded by each network."""
    from distill.data.index import ImageIndex

    rank = dist.get_rank() if dist.is_initialized() else 0
    here = Sharing(rank, dist.get_world_size()) if mode == "shared" else sharing.ALONE
    sharing.BATCH = BATCH
    split = scored(ImageIndex.load(run / "data" / "train"))
    held_out = scored(ImageIndex.load(run / "data" / "held_out"))
    found: list[Any] = []
    for part in (split, held_out):
        read = read_shared(part, 16, None, [32], sharing=here)
        found += [read.pixels, read.others[32], read.split.labels, list(map(str, read.left_out))]
        for name, size in (("vit", 16), ("conv", 32), ("vit", 24)):  # 24 px: of no size in memory
            backbone = load_backbone(run / "students" / name)[0]
            preparation = Preparation(size, MEAN, STD)
            out = extract_shared(backbone, read, preparation, device=CPU, sharing=here)
            found += [out.class_token, out.mean_patch, out.patch]
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shared__every_rank_has_the_bits_of_one_process(num_ranks: int, run_folder: Path) -> None:
    alone = on_ranks(1, features, run_folder, "alone")[0]
    assert "1.png" in str(alone) and len(alone[0]) == 30 and len(alone[13]) == 8
    for found in on_ranks(num_ranks, features, run_folder, "shared"):
        for ours, wanted in zip(found, alone, strict=True):
            assert torch.equal(ours, wanted) if isinstance(wanted, torch.Tensor) else ours == wanted


def test_extract_shared__alone_is_extract_all(run_folder: Path) -> None:
    from distill.data.index import ImageIndex

    read = read_split(scored(ImageIndex.load(run_folder / "data" / "train")), 16, None)
    backbone, preparation = (
        load_backbone(run_folder / "students" / "vit")[0],
        Preparation(16, MEAN, STD),
    )
    ours = extract_shared(backbone, read, preparation, device=CPU)
    wanted = extract_all(backbone, read.batches(preparation), preparation, device=CPU)
    assert torch.equal(ours.patch, wanted.patch) and torch.equal(
        ours.class_token, wanted.class_token
    )


def scores(run: Path) -> dict[str, Any]:
    sharing.BATCH = BATCH
    before = (run / "summary.json").stat().st_mtime_ns
    here = Sharing(dist.get_rank(), dist.get_world_size())
    summary = evaluate_run(run, lambda _: None, sharing=here)
    dist.barrier()
    assert (run / "summary.json").stat().st_mtime_ns != before
    return summary


def test_evaluate_run__on_ranks_is_that_of_one_process(run_folder: Path) -> None:
    alone = evaluate_run(run_folder, lambda _: None)
    first, second = on_ranks(2, scores, run_folder)
    assert first == alone and first["teacher"]["knn"] is not None
    assert second == {}
