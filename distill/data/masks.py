"""iBOT masks as a function of (seed, step, position): any rank draws the masks of any images and gets the same.

Of the global crops of the full batch, exactly the rounded share ``probability`` is masked. Their
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

from distill.data.stateless_random import Hash, hashes, uniforms

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
BLOCK_TRIES = 10


def draw_masks(
    *,
    seed: int,
    step: int,
    counts: NDArray[np.int64],
    positions: NDArray[np.int64],
    grid_hw: tuple[int, int],
) -> Bool[Tensor, "images 2 patches"]:
    """Masks of the images at ``positions`` of the global batch; ``counts`` are those of the full batch, from ``mask_counts``."""
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
