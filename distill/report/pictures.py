"""One picture of what the networks see: patch features as colours, and what resembles one patch.

    for each photograph (row), for each network (two columns):
        PCA     the first three principal components of its patch features as red, green and blue
        cosine  the similarity of every patch to the patch marked on the photograph

The photographs are larger than the training crops: RoPE and convolutions take any size, and a fine
grid shows what a class score cannot.

Principal components have no order or sign that two networks share, so the colours of every network
are turned (an orthogonal 3 x 3 matrix per photograph) to agree with the first network's as well as
they can. That moves no patch nearer to another; it only lets equal things have equal colours.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from distill.runfolder.files import replaced
from teacher.batch import Backbone, normalise

LONGER_SIDE_PX = 512  # the bundled photographs at the scale their tiles were cut
CELL_INCHES = 1.7
DPI = 110
CLIP_SIGMAS = 2.0  # of a component's spread; what lies outside is drawn as the end of the scale

Point = tuple[float, float]


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
    """``out``, now holding the picture: a row per photograph, two columns per network.

    ``photographs`` are uint8 RGB [height, width, 3]; ``points`` marks one patch of each as (row,
    column) in fractions of its height and width, the centre when not given. The networks satisfy
    ``Backbone``, are in evaluation mode and stay on their device.

    Raises:
        ValueError: no network or no photograph, or not one point for each photograph.
    """
    if not networks or not photographs:
        raise ValueError("a picture needs at least one network and one photograph")
    marks = points or [(0.5, 0.5)] * len(photographs)
    if len(marks) != len(photographs):
        raise ValueError(f"{len(marks)} points for {len(photographs)} photographs: give one each")
    multiple = math.lcm(*(cast(Backbone, backbone).stride for backbone in networks.values()))
    resized = [fit(photograph, longer_side_px, multiple) for photograph in photographs]
    figure, axes = _canvas(resized, list(networks))
    for photograph, point, row in zip(resized, marks, axes, strict=True):
        _plot_photograph(row[0], photograph, point)
        reference: Tensor | None = None
        for index, backbone in enumerate(networks.values()):
            patches = patch_features(backbone, photograph, mean, std)
            components = principal_components(patches)
            if reference is None:
                reference = components
            else:
                components = turn_towards(components, reference)
            row[2 * index + 1].imshow(rgb(components), interpolation="nearest")
            _plot_similarity(row[2 * index + 2], cosine_map(patches, point))
    with replaced(out) as aside:
        figure.savefig(aside, dpi=DPI, format="png")
    return out


def fit(
    photograph: UInt8[np.ndarray, "height width 3"], longer_side_px: int, multiple: int
) -> UInt8[np.ndarray, "fitted_height fitted_width 3"]:
    """The photograph with its longer side near ``longer_side_px`` and both sides a multiple."""
    height, width, _ = photograph.shape
    scale = longer_side_px / max(height, width)
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in (width, height)]
    resized = Image.fromarray(photograph).resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


@torch.inference_mode()
def patch_features(
    backbone: nn.Module,
    photograph: UInt8[np.ndarray, "photo_height photo_width 3"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "grid_height grid_width width"]:
    """Patch tokens of one photograph on their grid, in fp64 on the CPU."""
    device = next(backbone.parameters()).device
    pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].to(device)
    features = backbone(normalise(pixels, mean, std, dtype=torch.float32))
    return torch.unflatten(features.patch_tokens[0].double().cpu(), 0, features.grid_hw)


def principal_components(
    patches: Float[Tensor, "grid_height grid_width width"],
) -> Float[Tensor, "grid_height grid_width 3"]:
    """First three principal components of the patches, each with mean 0 and variance 1, in fp64.

    A component without any spread is 0. The sign makes the largest loading positive, so the same
    features always give the same colours.
    """
    rows = patches.flatten(0, 1)
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = rows @ (directions * largest.sign()).T
    spread = components.std(0, correction=0)
    components = torch.where(
        spread > 1e-9 * spread.max(), components / spread, torch.zeros_like(components)
    )
    return torch.unflatten(components, 0, patches.shape[:2])


def turn_towards(
    components: Float[Tensor, "grid_height grid_width 3"],
    reference: Float[Tensor, "other_height other_width 3"],
) -> Float[Tensor, "grid_height grid_width 3"]:
    """The components turned or mirrored, as one, to lie nearest to the reference (Procrustes)."""
    resized = torch.nn.functional.interpolate(
        reference.permute(2, 0, 1)[None], components.shape[:2], mode="bilinear"
    )[0].permute(1, 2, 0)
    left, _, right = torch.linalg.svd(components.flatten(0, 1).T @ resized.flatten(0, 1))
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
    directions = torch.nn.functional.normalize(patches, dim=-1)
    row, column = min(int(point[0] * height), height - 1), min(int(point[1] * width), width - 1)
    similarity: np.ndarray = (directions @ directions[row, column]).numpy()
    return similarity


def _canvas(photographs: Sequence[np.ndarray], names: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """A figure without ticks whose rows are as high as their photographs, with titled columns."""
    heights = [photograph.shape[0] / photograph.shape[1] for photograph in photographs]
    num_columns = 1 + 2 * len(names)
    maps_inches = CELL_INCHES * 0.95 * sum(heights)  # 5 % of a cell is the gap beside it
    figure = Figure(
        figsize=(CELL_INCHES * num_columns, maps_inches + 0.2 * len(heights) + 0.4),
        layout="constrained",
    )
    axes = figure.subplots(
        len(photographs), num_columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_title("photograph", fontsize=9)
    for index, name in enumerate(names):
        axes[0, 2 * index + 1].set_title(f"{name}\nPCA of patches", fontsize=9)
        axes[0, 2 * index + 2].set_title(f"{name}\nlike the marked patch", fontsize=9)
    return figure, axes


def _plot_photograph(axis: Axes, photograph: np.ndarray, point: Point) -> None:
    height, width, _ = photograph.shape
    axis.imshow(photograph)
    axis.plot(point[1] * width, point[0] * height, "o", ms=7, mfc="none", mec="white", mew=3.0)
    axis.plot(point[1] * width, point[0] * height, "o", ms=7, mfc="none", mec="red", mew=1.5)


def _plot_similarity(axis: Axes, similarity: np.ndarray) -> None:
    """The map stretched from its lowest value (given below it) to 1."""
    axis.imshow(
        similarity,
        cmap="magma",
        vmin=min(1.0, float(similarity.min())),
        vmax=1.0,
        interpolation="nearest",
    )
    axis.set_xlabel(f"cosine {similarity.min():.2f} to 1", fontsize=7, labelpad=2)
