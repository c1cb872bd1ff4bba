"""A contact sheet: what the networks are shown of the first images of a step.

One row per image: the image with its crop windows, its global crops with the masked patches darkened,
its anchor crops where there are any, its local crops. It is drawn from what the loader and the mask
sampler really give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from distill.data.crops import NUM_GLOBAL, CropParameters
from distill.runfolder.files import replaced
from teacher.batch import CropBatch

CELL = 160  # pixels of a global crop on the sheet
GAP = 6
BACKGROUND = (24, 24, 28)
GLOBAL_RGB = ((255, 92, 92), (92, 200, 255))
LOCAL_RGB = (240, 220, 90)
MASKED_LIGHT = 0.25  # of a masked patch


@dataclass(frozen=True)
class Row:
    """One image of a sheet: upright pixels, and the windows cut from it."""

    image: UInt8[np.ndarray, "photo_height photo_width 3"]
    windows: NDArray[np.float32]


def rows_of(images: Sequence[NDArray[np.uint8]], parameters: CropParameters) -> list[Row]:
    """Images, uint8 RGB [height, width, 3], with their windows, [crops, 4] each."""
    return [Row(image, windows) for image, windows in zip(images, parameters.windows, strict=True)]


def render_contact_sheet(
    rows: Sequence[Row],
    crops: CropBatch,
    masks: Bool[Tensor, "images 2 patches"],
    grid_hw: tuple[int, int],
    out: Path,
) -> Path:
    """``out``, now holding the picture: a row per image."""
    strips = []
    for index, row in enumerate(rows):
        cells = [_original(row)]
        for crop in range(NUM_GLOBAL):
            cells.append(_masked(crops.global_crops[index, crop], masks[index, crop], grid_hw))
        if crops.anchor_crops is not None:
            cells += [_cell(crop, CELL) for crop in crops.anchor_crops[index]]
        scale = crops.local_crops.shape[-1] / crops.global_crops.shape[-1]
        cells += [_cell(crop, round(CELL * scale)) for crop in crops.local_crops[index]]
        strips.append(_side_by_side(cells))
    width = max(strip.width for strip in strips)
    height = sum(strip.height + GAP for strip in strips) + GAP
    canvas = Image.new("RGB", (width + 2 * GAP, height), BACKGROUND)
    top = GAP
    for strip in strips:
        canvas.paste(strip, (GAP, top))
        top += strip.height + GAP
    with replaced(out) as aside:
        canvas.save(aside, "PNG")
    return out


def _original(row: Row) -> Image.Image:
    """The image at the height of a cell, windows in colours: both global ones, and the local ones."""
    image = Image.fromarray(row.image)
    scale = CELL / image.height
    small = image.resize((max(1, round(image.width * scale)), CELL))
    pen = ImageDraw.Draw(small)
    for index, (top, left, bottom, right) in reversed(list(enumerate(row.windows.tolist()))):
        rgb = GLOBAL_RGB[index] if index < NUM_GLOBAL else LOCAL_RGB
        first, last = sorted((left, right))  # swapped where the crop is mirrored
        box = [first * scale, top * scale, last * scale - 1, bottom * scale - 1]
        pen.rectangle(box, outline=rgb, width=2 if index < NUM_GLOBAL else 1)
    return small


def _masked(
    crop: UInt8[Tensor, "3 height width"], mask: Bool[Tensor, " patches"], grid_hw: tuple[int, int]
) -> Image.Image:
    light = torch.where(mask.view(1, 1, *grid_hw), MASKED_LIGHT, 1.0)
    light = torch.nn.functional.interpolate(light, size=crop.shape[-2:], mode="nearest")[0]
    return _cell((crop * light).to(torch.uint8), CELL)


def _cell(crop: UInt8[Tensor, "3 height width"], side: int) -> Image.Image:
    return Image.fromarray(crop.permute(1, 2, 0).numpy()).resize((side, side))


def _side_by_side(cells: Sequence[Image.Image]) -> Image.Image:
    width = sum(cell.width + GAP for cell in cells)
    strip = Image.new("RGB", (width, max(cell.height for cell in cells)), BACKGROUND)
    left = 0
    for cell in cells:
        strip.paste(cell, (left, 0))
        left += cell.width + GAP
    return strip
