from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from distill.listing.held import Held
from distill.listing.locations import Kind, Location
from distill.listing.map_pairs import PointPair
from distill.protocols.correspondence import score_correspondence
from distill.protocols.images import resized
from tests.support.dense_data import mean_colours, nothing

A, B = (Location(Kind.FILE, "/", name) for name in "ab")


@pytest.fixture
def pictures() -> Held:
    random = np.random.default_rng(0)
    arrays = {
        "a": random.integers(0, 256, (20, 30, 3), dtype=np.uint8),
        "b": random.integers(0, 256, (40, 24, 3), dtype=np.uint8),
    }
    return Held(lambda location: arrays[location.name], [], 0)


@pytest.mark.parametrize("box", [None, (0.0, 0.0, 10.0, 16.0)])
def test_score_correspondence__equals_a_plain_loop(
    pictures: Held, box: tuple[float, ...] | None
) -> None:
    network, cells = mean_colours(16, 4), 4
    random = np.random.default_rng(1)
    points = random.uniform(0, 1, (200, 4)) * [30, 20, 24, 40]
    one, other = (network.patches(resized(pictures(at), 16)[None])[0] for at in (A, B))
    limit = 0.1 * (max(24, 40) if box is None else 16)
    right = 0
    for x, y, other_x, other_y in points:
        known = one[:, int(y / 20 * cells), int(x / 30 * cells)]
        found = [
            (float(cosine_similarity(known, other[:, row, column], dim=0)), row, column)
            for row in range(cells)
            for column in range(cells)
        ]
        _, row, column = max(found)
        distance = np.hypot(
            (column + 0.5) * 24 / cells - other_x, (row + 0.5) * 40 / cells - other_y
        )
        right += distance <= limit
    pairs = [
        PointPair((A, B), tuple(map(tuple, points[half].tolist())), box)
        for half in (slice(90), slice(90, 200))
    ]
    score = score_correspondence(pairs, pictures, "quick", network, nothing)
    assert score.value == pytest.approx(right / 200) and 0 < right < 200
    assert score.settings["PCK@0.05"] <= score.value <= score.settings["PCK@0.2"]
    assert ("picture" in score.settings["threshold"]) == (box is None)


def test_score_correspondence__published_pictures_are_of_1024_px(pictures: Held) -> None:
    pair = PointPair((A, A), ((29.9, 19.9, 29.9, 19.9),), None)
    run = partial(score_correspondence, [pair], pictures, "dinov3")
    score = run(mean_colours(16, 4), nothing)
    assert score.value == 1.0 and score.settings["input"] == "1024 px"
    assert run(mean_colours(28, 28), nothing).settings["input"] == "1008 px"
    assert torch.is_grad_enabled()
