"""Patch features of a picture as colours, as its foreground, and as similarity to one patch."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distill.screen.picture_grid import Point

CLIP_SIGMAS = (
    2.0  # of a component's spread; what lies outside has the colour of the end of the scale
)
ROWS_AT_ONCE = 65_536  # patches in fp64
NUM_BINS = 256  # of first components, for the threshold between two groups
# A foreground holds this part of the patches and is on the border at most this part of what it is inside
LEAST_AREA, MOST_AREA, MOST_ON_BORDER = 0.03, 0.85, 0.6


def principal_components(
    patches: Float[Tensor, "grid_height grid_width width"],
    inside: Bool[Tensor, "grid_height grid_width"] | None = None,
) -> Float[Tensor, "grid_height grid_width 3"]:
    """First three principal components of the patches, each with mean 0 and variance 1, in fp64.

    A component without any spread is 0. The sign makes the largest loading positive, so the same
    features always give the same colours. ``inside``: patches that the components, mean and spread
    are of; the others are only projected.
    """
    rows = patches.flatten(0, 1)
    chosen = rows if inside is None else rows[inside.flatten()]
    mean = chosen.mean(0, dtype=torch.float64)
    if len(chosen) > chosen.shape[1]:  # the small square matrix has the same directions
        moments = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for part in chosen.split(ROWS_AT_ONCE):
            centred = part - mean
            moments += centred.T @ centred
        _, _, directions = torch.linalg.svd(moments)
    else:
        _, _, directions = torch.linalg.svd(chosen - mean, full_matrices=False)
    directions = F.pad(directions[:3], (0, 0, 0, max(0, 3 - len(directions))))
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = (directions * largest.sign()).T
    components = torch.cat([(part - mean) @ directions for part in rows.split(ROWS_AT_ONCE)])
    spread = components if inside is None else components[inside.flatten()]
    spread = spread.std(0, correction=0)
    is_flat = spread <= 1e-9 * max(float(spread.max()), 1e-300)
    components = torch.where(is_flat, 0.0, components / spread)
    return torch.unflatten(components, 0, patches.shape[:2])


def foreground_of(
    patches: Float[Tensor, "grid_height grid_width width"],
) -> Bool[Tensor, "grid_height grid_width"] | None:
    """The patches of what stands in the picture; None where no such group stands out.

    The first principal component is cut where its two groups differ most (Otsu). The foreground is the group that
    is rarer along the border of the picture than inside it, cleaned by a 3 x 3 median.
    """
    scores = principal_components(patches)[..., 0]
    is_high = scores > _threshold(scores)
    height, width = scores.shape
    margin = max(1, min(height, width) // 16)
    is_border = torch.ones_like(is_high)
    is_border[margin : height - margin, margin : width - margin] = False
    if bool(is_border.all()):
        return None
    for group in (is_high, ~is_high):
        area = float(group.float().mean())
        on_border, within = (float(group[part].float().mean()) for part in (is_border, ~is_border))
        if LEAST_AREA <= area <= MOST_AREA and on_border <= MOST_ON_BORDER * within:
            counts = F.avg_pool2d(
                group[None, None].float(), 3, stride=1, padding=1, count_include_pad=False
            )
            cleaned = counts[0, 0] > 0.5
            return cleaned if bool(cleaned.any()) else None
    return None


def _threshold(scores: Float[Tensor, "grid_height grid_width"]) -> float:
    """The cut with the largest variance between its two groups (Otsu 1979), on ``NUM_BINS`` bins."""
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        return high
    counts, edges = np.histogram(scores.numpy(), NUM_BINS, (low, high))
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * middles)
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * gap**2)])


def middle_of(mask: Bool[Tensor, "grid_height grid_width"]) -> Point:
    """The patch of a mask that is nearest to its centre of mass, as (row, column) in fractions."""
    found = mask.nonzero().float()
    nearest = found[(found - found.mean(0)).square().sum(1).argmin()]
    row, column = ((nearest + 0.5) / torch.tensor(mask.shape)).tolist()
    return row, column


def turn_towards(
    components: Float[Tensor, "grid_height grid_width 3"],
    reference: Float[Tensor, "other_height other_width 3"],
    inside: Bool[Tensor, "grid_height grid_width"] | None = None,
) -> Float[Tensor, "grid_height grid_width 3"]:
    """The components turned or mirrored, as one, to lie nearest to the reference (Procrustes), ``inside`` if it is given."""
    resized = F.interpolate(
        reference.permute(2, 0, 1)[None], components.shape[:2], mode="bilinear"
    )[0].permute(1, 2, 0)
    chosen = [
        each.flatten(0, 1) if inside is None else each[inside] for each in (components, resized)
    ]
    left, _, right = torch.linalg.svd(chosen[0].T @ chosen[1])
    turned: Tensor = components @ (left @ right)
    return turned


def rgb(
    components: Float[Tensor, "grid_height grid_width 3"],
) -> Float[np.ndarray, "grid_height grid_width 3"]:
    """Components as red, green and blue in [0, 1]; two sigmas reach the ends of the scale."""
    scaled = components / (2 * CLIP_SIGMAS) + 0.5
    values: np.ndarray = scaled.clamp(0.0, 1.0).numpy()
    return values


def cosine_map(
    patches: Float[Tensor, "grid_height grid_width width"], point: Point
) -> Float[np.ndarray, "grid_height grid_width"]:
    """Cosine similarity of each patch to the one at ``point`` (row, column in fractions)."""
    height, width, _ = patches.shape
    row, column = min(int(point[0] * height), height - 1), min(int(point[1] * width), width - 1)
    direction = F.normalize(patches[row, column], dim=-1)
    lengths = patches.norm(dim=-1).clamp_min(1e-12)
    similarity: np.ndarray = ((patches @ direction) / lengths).numpy()
    return similarity
