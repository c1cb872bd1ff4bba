"""iBOT masks as a function of (seed, step, position): any rank draws the masks of any images and gets the same.

Of the global crops of the whole batch, exactly the rounded share ``probability`` is masked. Their
ratios run evenly over the range, in an order drawn per step, so the amount of masking does not vary
between steps. A mask is grown from blocks and completed at random.

Source: DINOv2, appendix (masking); METHOD section 2.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from distill.data.counter import Hash, hashes, uniforms

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
BLOCK_TRIES = 10


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
    """Masked patches per image that ``mask_counts`` draws on average, both global crops together; whole patches, so a little under the mean ratio."""
    low, high = (part * grid_hw[0] * grid_hw[1] for part in ratio)
    if high == low:
        return 2 * probability * math.floor(low)
    return 2 * probability * (_floor_integral(high) - _floor_integral(low)) / (high - low)


def _floor_integral(end: float) -> float:
    """The integral of ``floor`` from 0 to ``end``."""
    whole = math.floor(end)
    return whole * (whole - 1) / 2 + whole * (end - whole)


def draw_masks(
    *,
    seed: int,
    step: int,
    counts: NDArray[np.int64],
    positions: NDArray[np.int64],
    grid_hw: tuple[int, int],
) -> Bool[Tensor, "images 2 patches"]:
    """Masks of the images at ``positions`` of the global batch; ``counts`` are those of the whole batch, from ``mask_counts``."""
    wanted = counts[positions]
    masks = np.zeros((len(positions), 2, grid_hw[0] * grid_hw[1]), bool)
    rows, crops = wanted.nonzero()
    if len(rows):
        words = hashes("mask", seed, step, 2 * positions[rows] + crops)
        masks[rows, crops] = _grow(words, wanted[rows, crops], grid_hw)
    return torch.from_numpy(masks)


def _grow(words: Hash, counts: NDArray[np.int64], grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Flat masks with exactly ``counts`` patches, [crops, patches]: blocks while they fit, then single patches at random."""
    height, width = grid_hw
    masks = np.zeros((len(counts), height, width), bool)
    draws = uniforms(words, 4 * BLOCK_TRIES).reshape(-1, BLOCK_TRIES, 4)
    down, right = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    for attempt in range(BLOCK_TRIES):
        area_u, aspect_u, top_u, left_u = draws[:, attempt].T
        missing = counts - masks.sum(axis=(1, 2))
        area = np.minimum(MIN_BLOCK_PATCHES, missing)
        area = area + area_u * np.maximum(0, missing - MIN_BLOCK_PATCHES)
        aspect = np.exp((2.0 * aspect_u - 1.0) * math.log(1.0 / MIN_ASPECT))
        rows = np.rint(np.sqrt(area * aspect)).clip(1, height)[:, None, None]
        columns = np.rint(np.sqrt(area / aspect)).clip(1, width)[:, None, None]
        top = np.floor(top_u[:, None, None] * (height - rows + 1))
        left = np.floor(left_u[:, None, None] * (width - columns + 1))
        block = (down >= top) & (down < top + rows) & (right >= left) & (right < left + columns)
        block &= ~masks
        fits = block.sum(axis=(1, 2)) <= missing  # none does where nothing is missing
        masks |= block & fits[:, None, None]
    flat = masks.reshape(len(counts), -1)
    missing = counts - flat.sum(axis=1)
    words = np.asarray(words)
    keys = np.asarray(hashes("mask-fill", words[:, None], np.arange(flat.shape[1])[None]))
    keys[flat] = np.iinfo(keys.dtype).max
    last = np.take_along_axis(np.sort(keys, axis=1), (missing - 1).clip(0)[:, None], axis=1)
    return flat | ((keys <= last) & (missing > 0)[:, None])
