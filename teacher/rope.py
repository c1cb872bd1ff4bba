"""Axial rotary position embedding for a grid of patches, in fp32.

Coordinates are patch centres scaled to [-1, 1] on each axis; head dimension D has D/4 periods
``base ** (2 i / (D / 2))``. The angles of the row and of the column are concatenated and repeated
once, and rotation pairs the first half of a head with the second.

Source: DINOv3 report, section 3.2 (RoPE and box jittering).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

ROPE_BASE = 100.0


def rope_angles(
    grid_hw: tuple[int, int], head_dim: int, scale: float, device: torch.device
) -> tuple[Float[Tensor, "patches head_dim"], Float[Tensor, "patches head_dim"]]:
    """Sine and cosine for each patch, row-major.

    ``scale`` stretches the box [-1, 1]; it is 1 outside training.
    """
    rows, columns = (
        ((torch.arange(count, dtype=torch.float32, device=device) + 0.5) / count * 2.0 - 1.0)
        * scale
        for count in grid_hw
    )
    exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * (4.0 / head_dim)
    periods = ROPE_BASE**exponents
    coordinates = torch.cartesian_prod(rows, columns)  # [patches, 2]
    angles = 2.0 * math.pi * coordinates[:, :, None] / periods  # [patches, 2, head_dim / 4]
    angles = angles.flatten(1).repeat(1, 2)  # [patches, head_dim]
    return angles.sin(), angles.cos()


def rotate(
    heads: Float[Tensor, "rows heads tokens head_dim"],
    sine: Float[Tensor, "patches head_dim"],
    cosine: Float[Tensor, "patches head_dim"],
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """Queries or keys with their last ``patches`` tokens rotated; those before pass unchanged.

    Computed in fp32, returned in the dtype that came in.
    """
    num_prefix = heads.shape[2] - sine.shape[0]
    prefix, patches = heads[:, :, :num_prefix], heads[:, :, num_prefix:].float()
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([prefix, turned.to(heads.dtype)], dim=2)
