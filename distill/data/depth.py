"""Which crops pass through which residual branch at a step: a function of (seed, step, position), like masks."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from distill.data.stateless_random import hashes, uniforms
from teacher.drop_path import BRANCHES


def draw_active(
    *, seed: int, step: int, positions: range, num_crops: int, num_blocks: int, survival: float
) -> Bool[Tensor, "images crops blocks 2"]:
    """Flags on the host; each is set with probability ``survival``, whatever rank holds the image."""
    images = np.arange(positions.start, positions.stop)
    words = hashes("depth", seed, step, images[:, None], np.arange(num_crops)[None])
    draws = uniforms(words, num_blocks * BRANCHES)
    return torch.from_numpy(draws < survival).unflatten(2, (num_blocks, BRANCHES))
