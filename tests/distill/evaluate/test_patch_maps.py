"""Features of one picture: on their grid, the same in one tile as without, and near in several."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.evaluate.patch_maps import (
    OVERLAP,
    _ramp,
    _stretches,
    fit,
    fitted_hw,
    patch_features,
    tile_shapes,
)
from distill.protocols.images import Preparation
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.batch import Features
from teacher.shapes import ViTSpec
from teacher.vit import Tile, ViT
from tests.support.pictures import picture

PREPARED = Preparation(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT = ViTSpec(width=32, depth=2, heads=2, ffn_width=64, patch=8, layerscale_init=0.5)
CONVNEXT = ConvNeXtSpec(depths=(1, 1), widths=(8, 16), layerscale_init=0.5)
# Of patch features of an untrained ViT on a smooth picture in tiles of half its side; measured: 0.998 and 0.901
NEAR_MEAN, NEAR_WORST = 0.995, 0.88


def built(spec: BackboneSpec) -> nn.Module:
    backbone = spec.build()
    spec.init_(backbone, torch.Generator().manual_seed(0))
    return backbone.eval()


@pytest.mark.parametrize("shape", [(100, 64), (64, 100), (33, 500), (4, 500)])
def test_fit__both_sides_are_multiples(shape: tuple[int, int]) -> None:
    photograph = np.zeros((*shape, 3), np.uint8)
    height, width, _ = fit(photograph, 128, 16).shape
    assert (height, width) == fitted_hw(shape, 128, 16)
    assert height % 16 == width % 16 == 0
    assert max(height, width) == 128


def test_patch_features__lie_on_the_grid() -> None:
    patches = patch_features(built(VIT), picture(0, 24, 40), PREPARED)
    assert patches.shape == (3, 5, 32)
    assert patches.dtype == torch.float32


@pytest.mark.parametrize("spec", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_patch_features__one_tile_is_no_tile(spec: BackboneSpec) -> None:
    backbone, pixels = built(spec), picture(0, 48, 64)
    expected = patch_features(backbone, pixels, PREPARED)
    assert torch.equal(patch_features(backbone, pixels, PREPARED, tile_px=64), expected)


def test_patch_features__tiles_are_near_to_one_pass() -> None:
    backbone, pixels = built(VIT), picture(0, 256, 256)
    expected = patch_features(backbone, pixels, PREPARED)
    found = patch_features(backbone, pixels, PREPARED, tile_px=128)
    nearness = F.cosine_similarity(found, expected, dim=-1)
    assert 0.9999 > float(nearness.mean()) > NEAR_MEAN
    assert float(nearness.min()) > NEAR_WORST


def test_patch_features__of_a_convnext_are_exact_beyond_the_reach_of_its_kernels() -> None:
    """Two blocks of 7 x 7 after strides of 4 and 8 px: an error at a tile's border reaches six patches."""
    backbone, pixels = built(CONVNEXT), picture(0, 64, 512)
    expected = patch_features(backbone, pixels, PREPARED)
    found = patch_features(
        backbone, pixels, PREPARED, tile_px=320
    )  # tiles of 40, overlapping by 16
    torch.testing.assert_close(found[:, :18], expected[:, :18], atol=1e-5, rtol=0)
    assert not torch.allclose(found[:, 24:40], expected[:, 24:40], atol=1e-5, rtol=0)


def test_patch_features__a_tile_of_a_vit_carries_its_coordinates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    got: list[tuple[Tile, tuple[int, int]]] = []
    forward = ViT.forward

    def noted(self: ViT, pixels: torch.Tensor, **options: Any) -> Features:
        got.append((options["tile"], (pixels.shape[2] // 8, pixels.shape[3] // 8)))
        return forward(self, pixels, **options)

    monkeypatch.setattr(ViT, "forward", noted)
    patch_features(built(VIT), picture(0, 64, 160), PREPARED, tile_px=64)
    assert [each[1] for each in got] == [(8, 8)] * 3
    assert [each[0] for each in got] == [Tile((8, 20), (0, left)) for left in (0, 6, 12)]


def test_patch_features__progress_ends_with_all_and_never_falls() -> None:
    for tile_px in (None, 32):
        done: list[float] = []
        patch_features(
            built(VIT), picture(0, 48, 64), PREPARED, tile_px=tile_px, on_part=done.append
        )
        assert done == sorted(done) and done[-1] == 1.0 and len(set(done)) > 1


@pytest.mark.parametrize(("length", "side"), [(8, 8), (9, 8), (20, 8), (512, 128), (5, 1), (7, 3)])
def test_tiles__cover_all_overlap_enough_and_their_weights_add_up(length: int, side: int) -> None:
    parts = _stretches(length, side)
    assert parts[0].start == 0 and parts[-1].stop == length
    for before, after in pairwise(parts):
        assert before.stop - after.start >= (side * OVERLAP if side > 1 else 0)
    total = torch.zeros(length)
    for part in parts:
        weights = _ramp(part, length, side)
        assert bool((weights > 0).all())
        total[part] += weights
    assert bool((total > 0).all())


def test_tile_shapes__are_those_of_the_forward_passes() -> None:
    assert tile_shapes((64, 160), None, 8) == [(64, 160)]
    assert tile_shapes((64, 160), 64, 8) == [(64, 64)] * 3
    assert tile_shapes((24, 160), 64, 8) == [(24, 64)] * 3
