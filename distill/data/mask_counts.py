"""How many patches of each crop are masked, without drawing a mask: what exchanges and plans need to know."""

import math

import numpy as np
from numpy.typing import NDArray

from distill.data.stateless_random import hashes, uniforms


def mask_counts(
    *,
    seed: int,
    step: int,
    images_global: int,
    grid_hw: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
) -> NDArray[np.int64]:
    """Masked patches of both global crops of every image of the batch, [images_global, 2], without drawing a mask."""
    num_crops = 2 * images_global
    num_masked = round(probability * num_crops)
    order = np.argsort(hashes("mask-order", seed, step, np.arange(num_crops)), kind="stable")
    jitter = uniforms(hashes("mask-ratio", seed, step, np.arange(num_masked)), 1)[:, 0]
    low, high = ratio
    ratios = low + (high - low) * (np.arange(num_masked) + jitter) / max(1, num_masked)
    counts = np.zeros(num_crops, np.int64)
    counts[order[:num_masked]] = (ratios * grid_hw[0] * grid_hw[1]).astype(np.int64)
    return counts.reshape(images_global, 2)


def mean_masked(
    grid_hw: tuple[int, int], *, probability: float, ratio: tuple[float, float]
) -> float:
    """Masked patches per image that ``mask_counts`` draws on average, both global crops together; rounded to patches, so a little under the mean ratio."""
    low, high = (part * grid_hw[0] * grid_hw[1] for part in ratio)
    if high == low:
        return 2 * probability * math.floor(low)
    return 2 * probability * (_floor_integral(high) - _floor_integral(low)) / (high - low)


def _floor_integral(end: float) -> float:
    """The integral of ``floor`` from 0 to ``end``."""
    floor = math.floor(end)
    return floor * (floor - 1) / 2 + floor * (end - floor)
