"""Maps of what networks see in a picture: patch features as colours, and what resembles one patch.

    PCA     the first three principal components of the patch features as red, green and blue
    cosine  the similarity of every patch to the patch marked on the picture

The pictures are larger than the training crops: RoPE and convolutions take any size, and a fine
grid shows what a class score cannot.

One basis for networks of different widths is the first network's: principal components have no order or sign
that two networks share, so the colours of every other network are turned (an orthogonal 3 x 3 matrix per
picture, Procrustes on the shared grid of patches) to agree with the first network's as well as they can. That
moves no patch nearer to another; it only lets equal things have equal colours. The foreground, if there is
one, is the first network's too, so that all are compared on the same patches.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.evaluate.patch_maps import fit, patch_features
from distill.protocols.images import Preparation
from distill.report.hover import HOVER, pack, write_hover
from distill.screen.components import (
    cosine_map,
    foreground_of,
    middle_of,
    principal_components,
    rgb,
    turn_towards,
)
from distill.screen.picture_grid import Band, Column, Point, render

LONGER_SIDE_PX = 512  # the bundled photographs at the scale their tiles were cut
CENTRE = (0.5, 0.5)


class PictureMaps:
    """Maps of one picture for several networks, all in the basis of the first."""

    def __init__(self, point: Point | None = CENTRE, *, has_foreground: bool = False) -> None:
        """``point``: row and column of the patch to compare with, in fractions; the foreground's middle without one."""
        self._point, self._has_foreground = point, has_foreground
        self._reference: Tensor | None = None
        self.foreground: Tensor | None = None

    @property
    def point(self) -> Point:
        """The patch that all are compared with; known after the first network, if not before."""
        return self._point or CENTRE

    def add(
        self, patches: Float[Tensor, "grid_height grid_width width"], title: str, note: str = ""
    ) -> Column:
        """The maps of one network, from its features on its grid."""
        if self._reference is None and self._has_foreground:
            self.foreground = foreground_of(patches)
        if self._point is None:
            self._point = CENTRE if self.foreground is None else middle_of(self.foreground)
        inside = None
        if self.foreground is not None:
            mask = self.foreground[None, None].float()
            inside = F.interpolate(mask, patches.shape[:2], mode="bilinear")[0, 0] > 0.5
        components = principal_components(patches, inside)
        if self._reference is None:
            self._reference = components
        else:
            components = turn_towards(components, self._reference, inside)
        pixels = rgb(components)
        if inside is not None:
            pixels[~inside.numpy()] = 0.0
        return Column(title, note, pixels, cosine_map(patches, self.point))


def plot_features(
    networks: Mapping[str, nn.Module],
    photographs: Sequence[np.ndarray],
    out: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    points: Sequence[Point] | None = None,
    longer_side_px: int = LONGER_SIDE_PX,
) -> Path:
    """``out``, now holding the picture: two rows per photograph, a column per network; beside it what a page compares.

    ``photographs`` are uint8 RGB [height, width, 3]; ``points`` marks one patch of each as (row,
    column) in fractions of its height and width, the centre when not given. The networks satisfy
    ``Backbone``, are in evaluation mode and stay on their device.

    Raises:
        ValueError: no network or no photograph, or not one point for each photograph.
    """
    if not networks or not photographs:
        raise ValueError("a picture needs at least one network and one photograph")
    marks = points or [CENTRE] * len(photographs)
    if len(marks) != len(photographs):
        raise ValueError(f"{len(marks)} points for {len(photographs)} photographs: give one each")
    preparation = Preparation(longer_side_px, mean, std)
    bands, packed = [], []
    for photograph, point in zip(photographs, marks, strict=True):
        maps, columns, features = PictureMaps(point), [], []
        for name, backbone in networks.items():
            fitted = fit(photograph, longer_side_px, int(backbone.stride))  # type: ignore[arg-type]
            patches = patch_features(backbone, fitted, preparation)
            columns.append(maps.add(patches, name))
            features.append(pack(patches, name))
        bands.append(Band(photograph, point, "", "", columns))
        packed.append((photograph, features))
    write_hover(out.with_name(HOVER), packed)
    return render(bands, out)
