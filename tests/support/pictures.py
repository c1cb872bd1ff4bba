"""Pictures to make crops of."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

NEUTRAL = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def picture(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Smooth random colours, so that resampling is well defined."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def blob(height: int = 24, width: int = 32, width_of_features: int = 6) -> torch.Tensor:
    """Features of a disc on a ground, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    ground, disc = torch.randn(2, width_of_features, generator=generator)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    inside = (rows - 10) ** 2 + (columns - 18) ** 2 < 49
    noise = 0.1 * torch.randn(height, width, width_of_features, generator=generator)
    return torch.where(inside[..., None], disc, ground) + noise
