import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.errors import UserError
from distill.protocols.images import (
    Preparation,
    Scored,
    count_images,
    decode,
    extract,
    read_preparation,
    read_split,
    read_splits,
)
from students.student import build_backbone
from teacher.batch import Features
from teacher.shapes import ViTSpec
from tests.support.gpu import CPU_AND_GPU
from tests.support.scored_run import CPU, MEAN, STD


class MeanColour(nn.Module):
    """Its class token is the mean of each normalised colour."""

    width = 3
    stride = 1

    def forward(
        self,
        pixels: Tensor,
        masks: Tensor | None = None,  # the protocol's
        *,
        rope_scale: float = 1.0,
        is_local: bool = False,
    ) -> Features:
        height, width = pixels.shape[-2:]
        patches = pixels.flatten(2).transpose(1, 2)
        return Features(pixels.mean((2, 3)), patches, (height, width))


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_extract__keeps_the_order_whatever_the_batch(
    splits: tuple[ImageIndex, ImageIndex], batch: int
) -> None:
    locations = [splits[0].location(image) for image in range(len(splits[0]))]
    features = extract(MeanColour(), locations, Preparation(16, MEAN, STD), device=CPU, batch=batch)
    images = np.stack([np.asarray(Image.open(str(place))) for place in locations]) / 255.0
    expected = (images.mean((1, 2)) - np.array(MEAN)) / np.array(STD)
    # fp32 means of 256 normalised pixels
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-5)


def test_decode__resizes_only_when_the_size_differs(tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(tile).save(tmp_path / "a.png")
    Image.fromarray(tile[..., 0]).save(tmp_path / "grey.png")
    assert torch.equal(
        decode(Reader(), Location.of(tmp_path / "a.png"), 16, None),
        torch.from_numpy(tile).permute(2, 0, 1),
    )
    assert decode(Reader(), Location.of(tmp_path / "grey.png"), 8, None).shape == (3, 8, 8)


def test_decode__broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.png: cannot be decoded"):
        decode(Reader(), Location.of(tmp_path / "broken.png"), 16, None)


def test_read_split__lays_clear_pixels_on_the_background(tmp_path: Path) -> None:
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 255  # red that is wholly clear
    Image.fromarray(hidden).save(tmp_path / "a.png")
    split = Scored([Location.of(tmp_path / "a.png")], torch.zeros(1, dtype=torch.int64))
    assert read_split(split, 8, None).pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert read_split(split, 8, (1, 2, 3)).pixels[0, :, 0, 0].tolist() == [1, 2, 3]


@CPU_AND_GPU
def test_extract__in_bf16_keeps_the_fourth_digit(device: str) -> None:
    """That is all in which class tokens of an untrained network differ."""
    spec = ViTSpec(32, 3, 2, 64)
    backbone = build_backbone(spec, torch.Generator().manual_seed(0), torch.device(device)).eval()
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        full = backbone(pixels).class_token
        with torch.autocast(device, torch.bfloat16):
            half = backbone(pixels).class_token.float()
    spread = (full - full.mean(0)).norm()
    assert (half - full - (half - full).mean(0)).norm() < 0.1 * spread


def test_count_images__names_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    on_batch = count_images(lines.append, "k-NN", 1000)
    for _ in range(2):
        now[0] += 30.0
        on_batch(100)
    assert lines == [
        "k-NN: 100 of 1,000 images, 3 a second, 4 min left",
        "k-NN: 200 of 1,000 images, 3 a second, 4 min left",
    ]


def test_read_splits__images_without_a_label_are_left_out(run_folder: Path) -> None:
    for part, count in (("train", 24), ("held_out", 12)):
        index = ImageIndex.load(run_folder / "data" / part)
        assert index.labels is not None
        labels = np.array(index.labels)
        labels[::3] = -1
        replace(index, labels=labels).save(run_folder / "data" / part)
        assert index.label_counts.total() == count
    train, test, reason = read_splits(run_folder, 5)
    assert not reason and (len(train.locations), len(test.locations)) == (16, 8)
    assert len(train.labels) == 16 and train.labels.min() == 0 and test.labels.min() == 0
    reason = read_splits(run_folder, 17)[2]
    assert reason == (
        "16 training and 8 held-out images with a label are too few for k-NN with k = 17"
    )


def test_read_splits__says_why_nothing_was_held_out(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "data" / "held_out")
    facts = run_folder / "data/images.json"
    facts.write_text('{"no_held_out": "data.held_out is 0"}')
    assert read_splits(run_folder, 5)[2] == "data.held_out is 0"


def test_read_preparation__takes_the_runs_where_nothing_usable_is_stated(run_folder: Path) -> None:
    folder, usual = run_folder / "teacher", Preparation(48, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9))
    assert read_preparation(folder, 8) == Preparation(16, MEAN, STD)
    assert read_preparation(folder, 12, usual) == Preparation(48, MEAN, STD)  # 16 is no multiple
    (folder / "preprocessor_config.json").unlink()
    assert read_preparation(folder, 8, usual) == usual
    with pytest.raises(UserError, match="stated nowhere"):
        read_preparation(folder, 8)
