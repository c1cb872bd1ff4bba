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


def draw_masks(
    *,
    seed: int,
    step: int,
    images_global: int,
    positions: NDArray[np.int64],
    grid_hw: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
) -> Bool[Tensor, "images 2 patches"]:
    """Masks of the images at ``positions`` of the global batch, with exactly the counts of ``mask_counts``."""
    counts = mask_counts(
        seed=seed,
        step=step,
        images_global=images_global,
        grid_hw=grid_hw,
        probability=probability,
        ratio=ratio,
    )[positions]
    masks = np.zeros((len(positions), 2, grid_hw[0] * grid_hw[1]), bool)
    for row, crop in zip(*counts.nonzero(), strict=True):
        word = hashes("mask", seed, step, 2 * positions[row] + crop)
        masks[row, crop] = _grow(word, int(counts[row, crop]), grid_hw)
    return torch.from_numpy(masks)


def _grow(word: Hash, count: int, grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """One flat mask with exactly ``count`` patches: blocks while they fit, then single patches at random."""
    height, width = grid_hw
    mask = np.zeros((height, width), bool)
    draws = uniforms(word, 4 * BLOCK_TRIES).reshape(BLOCK_TRIES, 4)
    for area_u, aspect_u, top_u, left_u in draws:
        missing = count - int(mask.sum())
        if missing <= 0:
            break
        area = min(MIN_BLOCK_PATCHES, missing) + area_u * max(0, missing - MIN_BLOCK_PATCHES)
        aspect = math.exp((2.0 * aspect_u - 1.0) * math.log(1.0 / MIN_ASPECT))
        rows = min(height, max(1, round(math.sqrt(area * aspect))))
        columns = min(width, max(1, round(math.sqrt(area / aspect))))
        top, left = int(top_u * (height - rows + 1)), int(left_u * (width - columns + 1))
        block = mask[top : top + rows, left : left + columns]
        if block.size - int(block.sum()) <= missing:
            block[:] = True
    flat = mask.ravel()
    missing = count - int(flat.sum())
    if missing:
        free = np.flatnonzero(~flat)
        order = np.argsort(hashes("mask-fill", word, free), kind="stable")
        flat[free[order[:missing]]] = True
    return flat
