"""The layout: every patch a square, nothing cut off, many columns in several bands."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.screen.picture_grid import MOST_COLUMNS, WHITE, Band, Column, _font, render, shortened
from tests.support.pictures import picture


def column(title: str, height: int = 8, width: int = 16, note: str = "a note") -> Column:
    random = np.random.default_rng(len(title))
    return Column(title, note, random.random((height, width, 3)), random.random((height, width)))


def rendered(bands: list[Band], out: Path) -> np.ndarray:
    with Image.open(render(bands, out)) as found:
        assert (found.format, found.mode) == ("PNG", "RGB")
        return np.asarray(found)


def test_render__every_patch_is_a_square_of_its_colour(tmp_path: Path) -> None:
    maps = column("one")
    found = rendered([Band(picture(0), (0.5, 0.5), "a", "", [maps])], tmp_path / "a.png")
    expected = (maps.rgb * 255).round().astype(np.uint8).repeat(16, 0).repeat(16, 1)
    windows = np.lib.stride_tricks.sliding_window_view(found, expected.shape)[:, :, 0]
    corner = (found[:, :, None] == expected[0, 0]).all(-1)[..., 0]
    places = [at for at in np.argwhere(corner) if (at < windows.shape[:2]).all()]
    assert any(np.array_equal(windows[y, x], expected) for y, x in places)


@pytest.mark.parametrize("size", [(8, 16), (64, 4), (2, 64), (300, 512)])
def test_render__nothing_reaches_the_border(tmp_path: Path, size: tuple[int, int]) -> None:
    long = "a-network-with-a-name-that-nobody-wants-to-read-to-its-end-but-somebody-gave-it"
    pixels = picture(0, size[0] * 4, size[1] * 4)
    columns = [column(long, *size, note=long), column("\u00e4\u0416\u03b1", *size)]
    found = rendered([Band(pixels, (0.0, 1.0), long, long, columns)], tmp_path / "a.png")
    for edge in (found[:4], found[-4:], found[:, :4], found[:, -4:]):
        assert (edge == WHITE).all()
    assert found.shape[0] > 4 * size[0] // 2 and found.shape[1] >= 3 * 180


def test_render__more_columns_than_fit_begin_a_new_band(tmp_path: Path) -> None:
    band = Band(picture(0), (0.5, 0.5), "a", "", [column(f"step {i}") for i in range(MOST_COLUMNS)])
    one = rendered([band], tmp_path / "one.png")
    two = rendered([replace(band, columns=[*band.columns, column("more")])], tmp_path / "two.png")
    assert two.shape[0] > 1.8 * one.shape[0] and two.shape[1] < one.shape[1]


def test_render__bands_of_any_shape_stand_below_each_other(tmp_path: Path) -> None:
    bands = [
        Band(picture(0, 40, 64), (0.5, 0.5), "a", "", [column("one", 5, 8)]),
        Band(
            picture(1, 64, 20), (0.1, 0.9), "b", "b", [column("one", 32, 10), column("two", 8, 2)]
        ),
    ]
    assert rendered(bands, tmp_path / "a.png").shape[0] > 4 * 160


def test_shortened__loses_its_middle() -> None:
    assert shortened("teacher", 12, 500) == "teacher"
    found = shortened("a" * 20 + "b" * 200 + "c" * 20, 12, 120)
    assert found.startswith("aaa") and found.endswith("ccc") and "\u2026" in found
    assert _font(12).getlength(found) <= 120
