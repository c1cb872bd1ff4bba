"""Correspondence: which patch of the second picture is nearest, by cosine, to the patch under a key point of the first.

A point is found where the centre of that patch lies within a fraction of the longer side of the second picture's box
(of the picture where no box is given) from the right point: PCK over all points, at 0.1 as the score.

    quick    pictures at the network's side
    dinov3   at 1024 px, as the published figures of SPair, rounded down to full patches
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill.listing.held import Held
from distill.listing.locations import Location
from distill.listing.map_pairs import PointPair
from distill.protocols.images import resized
from distill.protocols.linear_maps import OnBatch
from distill.protocols.map_set import PatchNetwork
from distill.protocols.score import Protocol, Score, bootstrap_sums, interval_of

THRESHOLDS = (0.05, 0.1, 0.2)
PUBLISHED_PX = 1024
HELD_PICTURES = 32  # features of the last ones: pairs of a list share pictures


def score_correspondence(
    pairs: Sequence[PointPair],
    pictures: Held,
    protocol: Protocol,
    network: PatchNetwork,
    on_batch: OnBatch,
) -> Score:
    """PCK@0.1 with an interval over pairs; the other thresholds are in the settings."""
    size = network.preparation.size
    if protocol == "dinov3":
        size = PUBLISHED_PX // network.stride * network.stride

    @lru_cache(HELD_PICTURES)
    def features(location: Location) -> tuple[Tensor, tuple[int, int]]:
        pixels = pictures(location)
        found = network.patches(resized(pixels, size)[None])[0]
        return normalize(found, dim=0), pixels.shape[:2]

    rows = []
    for pair in pairs:
        (known, known_hw), (query, hw) = (features(each) for each in pair.pictures)
        distances = torch.tensor(
            [_distance(known, known_hw, query, hw, point) for point in pair.points]
        )
        box = pair.box or (0, 0, hw[1], hw[0])
        limit = max(box[2] - box[0], box[3] - box[1])
        right = [int((distances <= each * limit).sum()) for each in THRESHOLDS]
        rows.append(torch.tensor([*right, len(distances)], dtype=torch.float64))
        on_batch(1)
    sums = torch.stack(rows)
    values = (sums[:, :-1].sum(0) / sums[:, -1].sum()).tolist()
    by_threshold = {f"PCK@{t:g}": v for t, v in zip(THRESHOLDS, values, strict=True) if t != 0.1}
    boxes = sum(pair.box is not None for pair in pairs)
    of = {0: "picture", len(pairs): "box"}.get(boxes, "box, of the picture where there is none")
    settings = {
        **by_threshold,
        "pairs": len(pairs),
        "points": int(sums[:, -1].sum()),
        "threshold": f"0.1 of the longer side of the {of}",
        "input": f"{size} px",
        "features": "patches, final norm",
    }
    resampled = bootstrap_sums(sums, lambda s: s[:, THRESHOLDS.index(0.1)] / s[:, -1])
    return Score("correspondence", protocol, values[1], interval_of(resampled), settings)


def _distance(
    known: Tensor,
    known_hw: tuple[int, int],
    query: Tensor,
    hw: tuple[int, int],
    point: tuple[float, ...],
) -> float:
    """Pixels of the second picture between the right point and the centre of the nearest patch."""
    at = [
        min(int(value / side * cells), cells - 1)
        for value, side, cells in zip(point[1::-1], known_hw, known.shape[1:], strict=True)
    ]
    cosines = torch.einsum("w,whv->hv", known[:, at[0], at[1]], query)
    row, column = divmod(int(cosines.argmax()), query.shape[2])
    y, x = (
        (index + 0.5) / cells * side
        for index, cells, side in zip((row, column), query.shape[1:], hw, strict=True)
    )
    return float(((x - point[2]) ** 2 + (y - point[3]) ** 2) ** 0.5)
