from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.listing.held import Held
from distill.listing.locations import Location
from distill.protocols.images import resized
from distill.protocols.linear_maps import (
    AHEAD,
    RIDGE,
    Published,
    augment,
    crop_of,
    fit_published,
    fit_quick,
    rate_at,
    samples,
    solve_ridge,
)
from distill.protocols.map_scores import DepthTarget, SegTarget
from distill.protocols.map_set import IGNORED
from tests.support.dense_data import map_set, mean_colours, nothing

CLASSES = 3
SHORT = Published(60, 10, 3e-2, 1e-3, (0.9, 0.999), (16, 16), scales=(0.8, 1.5), slide=12, batch=4)


def pictures(count: int, hw: tuple[int, int], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Regions of three colours with noise; the map has one class each, and a few pixels are ignored."""
    random = np.random.default_rng(seed)
    colours = np.array([[30, 60, 200], [200, 50, 60], [60, 200, 70]])
    found = []
    for _ in range(count):
        classes = random.integers(0, CLASSES, (3, 4))
        rows = np.arange(hw[0]) * 3 // hw[0]
        columns = np.arange(hw[1]) * 4 // hw[1]
        values = classes[rows][:, columns]
        pixels = colours[values] + random.integers(-25, 26, (*hw, 3))
        values = np.where(random.random(hw) < 0.1, IGNORED, values).astype(np.int16)
        found.append((pixels.clip(0, 255).astype(np.uint8), values))
    return found


def test_fit_quick__equals_a_plain_loop() -> None:
    """Patch by patch, pixel by pixel: shares, standardised ridge regression, bilinear prediction."""
    network, hw, size, stride = mean_colours(16, 4), (21, 30), 16, 4
    train, test = pictures(5, hw, 0), pictures(1, hw, 1)
    predict = fit_quick(network, map_set(train, test), SegTarget(CLASSES), nothing)
    rows, wanted, weights = [], [], []
    cells = size // stride
    for pixels, values in train:
        features = network.patches(resized(pixels, size)[None])[0].double().numpy()
        for row in range(cells):
            for column in range(cells):
                inside = [
                    int(values[y, x])
                    for y in range(hw[0])
                    for x in range(hw[1])
                    if int((y + 0.5) / hw[0] * cells) == row
                    and int((x + 0.5) / hw[1] * cells) == column
                ]
                counted = [value for value in inside if value != IGNORED]
                rows.append(features[:, row, column])
                weights.append(len(counted) / len(inside))
                wanted.append([counted.count(c) / len(counted) for c in range(CLASSES)])
    x, y, w = np.array(rows), np.array(wanted), np.array(weights)[:, None]
    mean = (w * x).sum(0) / w.sum()
    spread = np.sqrt((w * (x - mean) ** 2).sum(0) / w.sum())
    design = np.concatenate([(x - mean) / spread, np.ones((len(x), 1))], axis=1)
    moments = (w * design).T @ design / w.sum()
    penalty = RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
    solved = np.linalg.solve(moments + penalty, (w * design).T @ y / w.sum())
    pixels, _ = test[0]
    features = network.patches(resized(pixels, size)[None])[0].double().numpy()
    grid = np.einsum(
        "wrc,wk->krc", (features - mean[:, None, None]) / spread[:, None, None], solved[:-1]
    )
    grid += solved[-1][:, None, None]
    found = predict(pixels)
    for row in range(0, hw[0], 4):
        for column in range(0, hw[1], 5):
            at = [
                min(max((i + 0.5) / side * cells - 0.5, 0), cells - 1)
                for i, side in zip((row, column), hw, strict=True)
            ]
            low = [int(each) for each in at]
            high = [min(each + 1, cells - 1) for each in low]
            part = [each - floor for each, floor in zip(at, low, strict=True)]
            right = (
                grid[:, low[0], low[1]] * (1 - part[0]) * (1 - part[1])
                + grid[:, high[0], low[1]] * part[0] * (1 - part[1])
                + grid[:, low[0], high[1]] * (1 - part[0]) * part[1]
                + grid[:, high[0], high[1]] * part[0] * part[1]
            )
            assert found[:, row, column].numpy() == pytest.approx(right, abs=1e-5)


def test_solve_ridge__is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 6)), random.normal(size=(50, 2))
    strength = RIDGE * np.diag(x.T @ x).mean()
    right = Ridge(alpha=strength, fit_intercept=False).fit(x, y).coef_.T
    found = solve_ridge(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y))
    assert found.numpy() == pytest.approx(right)


def test_fit_quick__features_that_never_change_give_the_mean() -> None:
    grey = np.full((8, 8, 3), 90, np.uint8)
    values = np.zeros((8, 8), np.int16)
    values[:, ::4] = 1
    maps = map_set([(grey, values)], [(grey, values)])
    found = fit_quick(mean_colours(8, 4), maps, SegTarget(2), nothing)(grey)
    assert found[0].numpy() == pytest.approx(0.75, abs=0.01)


def test_fit_published__learns_classes_and_predicts_in_windows() -> None:
    network = mean_colours(16, 4)
    test = pictures(3, (24, 40), 1)
    maps = map_set(pictures(12, (24, 40), 0), test)
    counts: list[int] = []
    predict = fit_published(network, maps, SegTarget(CLASSES, SHORT), counts.append)
    assert counts == [4] * 60
    right = [
        (predict(pixels).argmax(0).numpy() == values)[values != IGNORED] for pixels, values in test
    ]
    assert np.concatenate(right).mean() > 0.85
    again = fit_published(network, maps, SegTarget(CLASSES, SHORT), nothing)
    assert torch.equal(again(test[0][0]), predict(test[0][0]))


def test_fit_published__learns_depth_and_averages_the_mirror_image() -> None:
    network = mean_colours(16, 4)
    short = Published(150, 20, 3e-2, 1e-4, (0.9, 0.99), (16, 24), 35.0, degrees=2.5, batch=4)
    as_depth = [
        (pixels, np.where(values == IGNORED, 0, 1 + 2 * values).astype(np.float32))
        for pixels, values in pictures(12, (24, 40), 0)
    ]
    predict = fit_published(network, map_set(as_depth, as_depth), DepthTarget(short), nothing)
    pixels, values = as_depth[0]
    good = values > 0
    relative = np.abs(predict(pixels)[0].numpy() - values)[good] / values[good]
    assert relative.mean() < 0.4
    mirrored = predict(pixels[:, ::-1].copy()).flip(2)
    assert torch.allclose(mirrored, predict(pixels), atol=1e-4)


def test_samples__no_more_than_a_few_are_read_ahead() -> None:
    """A reader that is faster than the network would fill the memory with a large set."""
    maps = map_set(pictures(3 * AHEAD, (8, 8), 0), [])
    reads: list[str] = []

    def read(location: Location) -> np.ndarray:
        reads.append(location.name)
        return maps.values(location)

    counted = replace(maps, values=Held(read, [], 0))
    first = next(iter(samples(counted, counted.train)))
    assert np.array_equal(first[1], maps.values(maps.train[0].map)) and len(reads) <= AHEAD
    found = [values for _, values in samples(counted, counted.train)]
    assert len(found) == 3 * AHEAD


def test_rate_at__up_and_down_as_published() -> None:
    how = Published(40_000, 1500, 1e-3, 1e-3, (0.9, 0.999), (512, 512))
    assert rate_at(how, 0) == pytest.approx(1e-6)
    assert rate_at(how, 750) == pytest.approx((1e-6 + 1e-3) / 2)
    assert rate_at(how, 1500) == pytest.approx(1e-3)
    assert rate_at(how, (40_000 + 1500) // 2) == pytest.approx(5e-4)
    assert rate_at(how, 40_000) == pytest.approx(0)


@pytest.mark.parametrize(("stride", "crop"), [(16, (512, 512)), (14, (504, 504)), (8, (512, 512))])
def test_crop_of__full_patches(stride: int, crop: tuple[int, int]) -> None:
    assert crop_of(Published(1, 0, 1, 0, (0, 0), (512, 512)), stride) == crop


@pytest.mark.parametrize("how", [SHORT, Published(1, 0, 1, 0, (0, 0), (16, 16), degrees=2.5)])
def test_augment__picture_and_map_stay_together_and_nothing_counts_beyond(how: Published) -> None:
    """The class is written into the colour; both scaled, cropped and mirrored alike, except at borders."""
    target: SegTarget = SegTarget(CLASSES, how)
    random = np.random.default_rng(0)
    values = np.kron(np.array([[0, 1], [2, 0]]), np.ones((5, 10), int)).astype(np.int16)
    pixels = np.repeat((values[..., None] * 100).astype(np.uint8), 3, axis=2)
    is_beyond = False
    for _ in range(20):
        crop, wanted = augment(pixels, values, target, (16, 16), random)
        assert crop.shape == (3, 16, 16) and wanted.shape == (16, 16)
        beyond: Tensor = wanted == IGNORED
        is_beyond |= bool(beyond.any())
        inside = ~beyond
        agrees = (crop[0].float() / 100).round()[inside] == wanted[inside]
        assert agrees.float().mean() > 0.75
    assert is_beyond
