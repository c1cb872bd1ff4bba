from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.report.hover import HOVER
from distill.report.pictures import PictureMaps, plot_features
from distill.screen.components import middle_of
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec
from tests.support.pictures import blob

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_backbones() -> dict[str, torch.nn.Module]:
    specs: dict[str, BackboneSpec] = {
        "vit": ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8),
        "conv": ConvNeXtSpec(depths=(1, 1, 1), widths=(8, 8, 16)),
    }
    backbones = {name: spec.build() for name, spec in specs.items()}
    for backbone in backbones.values():
        backbone.spec.init_(backbone, torch.Generator().manual_seed(0))
        backbone.eval()
    return backbones


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_draw__writes_one_picture(tmp_path: Path) -> None:
    out = tmp_path / "features.png"
    photographs = [photograph(40, 64), photograph(64, 64)]
    drawn = plot_features(
        small_backbones(), photographs, out, mean=MEAN, std=STD, longer_side_px=64
    )
    assert drawn == out
    assert {path.name for path in tmp_path.iterdir()} == {"features.png", HOVER}
    with Image.open(out) as picture:
        assert picture.width > 3 * 180 and picture.height > 4 * 160, "two rows for each picture"


def test_draw__a_photograph_of_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All patches are alike, and rounding may put every cosine above 1."""

    def above(patches: torch.Tensor, _: object) -> np.ndarray:
        return np.full(patches.shape[:2], 1.0000002, np.float32)

    monkeypatch.setattr("distill.report.pictures.cosine_map", above)
    flat, out = [np.full((32, 32, 3), 90, np.uint8)], tmp_path / "features.png"
    plot_features(small_backbones(), flat, out, mean=MEAN, std=STD, longer_side_px=32)
    assert out.is_file()


def test_draw__points_and_photographs_must_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 points for 2 photographs"):
        plot_features(
            small_backbones(),
            [photograph(64, 64)] * 2,
            tmp_path / "a.png",
            mean=MEAN,
            std=STD,
            points=[(0.5, 0.5)],
        )


def test_draw__nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one network and one photograph"):
        plot_features({}, [photograph(64, 64)], tmp_path / "a.png", mean=MEAN, std=STD)


def test_picture_maps__all_networks_have_the_basis_and_the_foreground_of_the_first() -> None:
    patches = blob()
    turn, _ = torch.linalg.qr(torch.randn(6, 6))
    wider = torch.cat([patches @ turn, torch.zeros(24, 32, 3)], dim=-1)
    maps = PictureMaps(None, has_foreground=True)
    first, second = maps.add(patches, "first"), maps.add(wider, "second", "wider")
    assert maps.foreground is not None and maps.point == middle_of(maps.foreground)
    outside = ~maps.foreground.numpy()
    assert not first.rgb[outside].any() and not second.rgb[outside].any()
    np.testing.assert_allclose(first.rgb, second.rgb, atol=1e-3)
    np.testing.assert_allclose(first.similarity, second.similarity, atol=1e-5)
    assert (second.title, second.note) == ("second", "wider")
