"""The dense probe: mosaics whose masks are known, and a linear segmentation of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.locations import Location
from distill.protocols.images import Preparation, Scored
from distill.protocols.mosaics import (
    DenseProbe,
    Mosaics,
    compose,
    drift,
    mean_iou,
    segmentation_score,
)
from teacher.shapes import ViTSpec

SIZE, STRIDE = 16, 8


@pytest.fixture
def split(tmp_path: Path) -> Scored:
    """Eight classes of one colour each (red numbers the class), two images of each."""
    locations, labels = [], []
    for label in range(8):
        for copy in range(2):
            path = tmp_path / f"{label}-{copy}.png"
            Image.new(
                "RGB", (20, 20), (30 * label, 255 * (label % 2), 255 * (label // 2 % 2))
            ).save(path)
            locations.append(Location.of(path))
            labels.append(label)
    return Scored(locations, torch.tensor(labels))


def test_compose__each_pixel_is_of_its_class_and_the_seed_decides(split: Scored) -> None:
    mosaics = compose(split, 3, SIZE, STRIDE)
    assert mosaics.images.shape == (3, 3, 32, 32)
    reds = mosaics.images[:, 0].long()
    assert torch.equal(reds, 30 * mosaics.classes)
    assert all(len(one.unique()) > 2 for one in mosaics.classes)
    assert torch.equal(compose(split, 3, SIZE, STRIDE).images, mosaics.images)
    assert not torch.equal(compose(split, 3, SIZE, STRIDE, seed=1).images, mosaics.images)


def test_patch_classes__what_covers_most() -> None:
    classes = torch.zeros(1, 4, 4, dtype=torch.int64)
    classes[0, :2, 2:] = 1
    classes[0, 2:, :2] = torch.tensor([[2, 2], [2, 0]])
    mosaics = Mosaics(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), classes)
    assert mosaics.patch_classes(2).tolist() == [[0, 1, 2, 0]]


def test_mean_iou__by_hand() -> None:
    predicted, wanted = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    assert mean_iou(predicted, wanted) == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_segmentation_score__separable_is_one_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(rng.integers(0, 4, 400))
    apart = torch.nn.functional.one_hot(classes, 4).float()
    assert segmentation_score(apart[:200], classes[:200], apart[200:], classes[200:]) == 1.0
    noise = torch.from_numpy(rng.normal(size=(400, 4))).float()
    assert segmentation_score(noise[:200], classes[:200], noise[200:], classes[200:]) < 0.4


def test_dense_probe__scores_a_network_that_sees_colours(split: Scored) -> None:
    spec = ViTSpec(width=32, depth=1, heads=2, ffn_width=32, patch=STRIDE, layerscale_init=1e-5)
    vit = spec.build()
    spec.init_(vit, torch.Generator().manual_seed(0))
    preparation = Preparation(SIZE, (0.5,) * 3, (0.25,) * 3)
    probe = DenseProbe((split, split), preparation, STRIDE)
    score, patches = probe.score(vit.eval(), preparation)
    assert score > 0.5
    assert drift(patches, patches) == pytest.approx(0.0, abs=1e-10)
    assert drift(patches, patches.roll(1, dims=1)) > 1e-3
