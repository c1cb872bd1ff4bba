from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.report.pictures import (
    cosine_map,
    fit,
    patch_features,
    plot_features,
    principal_components,
    rgb,
    turn_towards,
)
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

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
    assert [path.name for path in tmp_path.iterdir()] == ["features.png"]
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100


def test_draw__a_photograph_of_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All patches are alike, and rounding may put every cosine above 1."""
    above = np.full((4, 4), 1.0000002, np.float32)
    monkeypatch.setattr("distill.report.pictures.cosine_map", lambda *_: above)
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


@pytest.mark.parametrize("shape", [(100, 64), (64, 100), (33, 500)])
def test_fit__both_sides_are_multiples(shape: tuple[int, int]) -> None:
    height, width, _ = fit(photograph(*shape), 128, 16).shape
    assert height % 16 == width % 16 == 0
    assert max(height, width) == 128


def test_patch_features__lie_on_the_grid() -> None:
    backbone = small_backbones()["vit"]
    patches = patch_features(backbone, photograph(24, 40), MEAN, STD)
    assert patches.shape == (3, 5, 16)
    assert patches.dtype == torch.float64


def test_principal_components__are_white_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 9.0, 3.0, 0.1, 5.0], dtype=torch.float64)
    patches = torch.randn(12, 10, 5, generator=generator, dtype=torch.float64) * scales + 4.0
    components = principal_components(patches)
    rows = components.flatten(0, 1)
    covariance = rows.T @ rows / len(rows)
    assert torch.allclose(covariance, torch.eye(3, dtype=torch.float64), atol=1e-9)
    for index, source in enumerate((1, 4, 2)):
        correlation = torch.corrcoef(torch.stack([rows[:, index], patches[..., source].flatten()]))
        assert correlation[0, 1] > 0.9  # and the sign is that of the largest loading


def test_principal_components__flat_features_are_grey() -> None:
    components = principal_components(torch.ones(3, 3, 8, dtype=torch.float64))
    assert not components.any()
    assert (rgb(components) == 0.5).all()


def test_turn_towards__undoes_a_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = principal_components(torch.randn(6, 7, 4, generator=generator, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    turned = turn_towards(reference @ turn, reference)
    assert torch.allclose(turned, reference, atol=1e-9)


def test_cosine_map__is_one_at_the_point() -> None:
    patches = torch.randn(4, 6, 8, dtype=torch.float64)
    similarity = cosine_map(patches, (0.99, 0.0))
    assert similarity.shape == (4, 6)
    assert similarity[3, 0] == pytest.approx(1.0)
    expected = torch.cosine_similarity(patches[3, 0], patches[1, 2], dim=0)
    assert similarity[1, 2] == pytest.approx(float(expected))
