"""Pictures to make crops of."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEUTRAL = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def picture(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Smooth random colours, so that resampling is well defined."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
