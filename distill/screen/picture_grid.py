"""Maps of pictures laid out in one PNG: a band per picture, in it a column per network, PCA above cosine.

Every patch is a square of pixels on the grid of a band's first network, so nothing is blurred. Text
grows with the maps; a name that is too long for its column gets smaller and then loses its middle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from distill.runfolder.files import replaced

LEAST_LONGER_PX = 256  # of a map's longer side
LEAST_COLUMN_PX = 180  # room for its title
MOST_COLUMNS = 6  # of networks side by side; more begin a new band
PALETTE = "magma"
WHITE, INK, DIM = (255, 255, 255), (23, 27, 33), (91, 99, 112)
LEGEND = (
    "above: PCA of patches",
    "as red, green, blue",
    "here: cosine with the",
    "marked patch",
)
Rgb = tuple[int, int, int]
Point = tuple[float, float]  # row and column in fractions


@dataclass(frozen=True)
class Column:
    """Maps of one network: colours in [0, 1] and cosines, with two lines of title."""

    title: str
    note: str
    rgb: Float[np.ndarray, "grid_height grid_width 3"]
    similarity: Float[np.ndarray, "grid_height grid_width"]


@dataclass(frozen=True)
class Band:
    """One picture with the maps of all networks. ``point``: the marked patch."""

    picture: UInt8[np.ndarray, "height width 3"]
    point: Point
    title: str
    note: str
    columns: Sequence[Column]


def render(bands: Sequence[Band], out: Path) -> Path:
    """``out``, now holding all bands one below the other."""
    bands = [part for band in bands for part in _split(band)]
    sizes = [_map_size(band) for band in bands]
    column_px = max(LEAST_COLUMN_PX, *(width for width, _ in sizes))
    text = _Text(max(12, max(max(size) for size in sizes) // 22))
    gap = text.px
    num_columns = 1 + max(len(band.columns) for band in bands)
    heights = [_band_height(band, size[1], text) for band, size in zip(bands, sizes, strict=True)]
    heights[0] += max(0, _legend_height(text) - sizes[0][1] - text.line_px)
    canvas = Image.new(
        "RGB", (gap + num_columns * (column_px + gap), gap + sum(heights) + gap * len(bands)), WHITE
    )
    pen, top = ImageDraw.Draw(canvas), gap
    for band, size, height in zip(bands, sizes, heights, strict=True):
        frame = _Frame(gap, top, column_px, text)
        below = _plot_band(canvas, pen, band, size, frame)
        if top == gap:
            _plot_legend(canvas, pen, (frame.left(0), below), frame)
        top += height + gap
    with replaced(out) as aside:
        canvas.save(aside, "PNG", optimize=True)
    return out


def _split(band: Band) -> list[Band]:
    """Bands of at most ``MOST_COLUMNS``, as even as can be."""
    num_parts = math.ceil(len(band.columns) / MOST_COLUMNS)
    each = math.ceil(len(band.columns) / num_parts)
    return [
        Band(band.picture, band.point, band.title, band.note, band.columns[start : start + each])
        for start in range(0, len(band.columns), each)
    ]


def _map_size(band: Band) -> tuple[int, int]:
    """Width and height of its maps in pixels."""
    height, width = band.columns[0].similarity.shape
    scale = max(1, math.ceil(LEAST_LONGER_PX / max(height, width)))
    return width * scale, height * scale


class _Text:
    """Text of one size on a canvas."""

    def __init__(self, px: int) -> None:
        self.px, self.line_px = px, math.ceil(px * 1.35)

    def write(
        self, pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, room_px: int, ink: Rgb = INK
    ) -> None:
        """Writes one line that fits into ``room_px``."""
        for px in range(self.px, max(9, self.px * 2 // 3) - 1, -1):
            if _font(px).getlength(text) <= room_px:
                break
        pen.text((at[0], at[1] + self.px - px), shortened(text, px, room_px), ink, _font(px))


def shortened(text: str, px: int, room_px: int) -> str:
    """The text without as much of its middle as has no room."""
    count = len(text)
    shown = text
    while count > 2 and _font(px).getlength(shown) > room_px:
        count -= 1
        shown = text[: (count + 1) // 2] + "\u2026" + text[len(text) - count // 2 :]
    return shown


@cache
def _font(px: int) -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, px)


@dataclass(frozen=True)
class _Frame:
    """Where a band begins, the width of its columns, and its text."""

    gap: int
    top: int
    column_px: int
    text: _Text

    def left(self, column: int) -> int:
        return self.gap + column * (self.column_px + self.gap)


def _titled(band: Band) -> list[Band | Column]:
    return [band, *band.columns]


def _has_notes(band: Band) -> bool:
    return any(each.note for each in _titled(band))


def _band_height(band: Band, map_px: int, text: _Text) -> int:
    """Titles, two maps, and the line below each cosine map."""
    return (2 if _has_notes(band) else 1) * text.line_px + 2 * map_px + text.px // 2 + text.line_px


def _legend_height(text: _Text) -> int:
    return (len(LEGEND) + 2) * text.line_px + text.px


def _plot_band(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, band: Band, size: tuple[int, int], frame: _Frame
) -> int:
    """Where its second row begins."""
    text, room = frame.text, frame.column_px
    head = (2 if _has_notes(band) else 1) * text.line_px
    first, second = frame.top + head, frame.top + head + size[1] + text.px // 2
    for index, titled in enumerate(_titled(band)):
        left = frame.left(index)
        text.write(pen, (left, frame.top), titled.title or "picture", room)
        text.write(pen, (left, frame.top + text.line_px), titled.note, room, DIM)
    canvas.paste(_marked(band, size), (frame.left(0), first))
    for index, column in enumerate(band.columns):
        left = frame.left(index + 1)
        low = min(1.0, float(column.similarity.min()))
        canvas.paste(_enlarged(column.rgb, size), (left, first))
        canvas.paste(_enlarged(_in_palette(column.similarity, low), size), (left, second))
        below = (left, second + size[1] + text.px // 4)
        text.write(pen, below, f"cosine {low:.2f} to 1", room, DIM)
    return second


def _plot_legend(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], frame: _Frame
) -> None:
    """What the two rows are, and the scale of the cosines."""
    text, (left, top), room = frame.text, at, frame.column_px
    for index, line in enumerate(LEGEND):
        text.write(pen, (left, top + index * text.line_px), line, room, DIM)
    top += len(LEGEND) * text.line_px + text.px // 3
    scale = np.linspace(0.0, 1.0, 64)[None]
    width = min(room, 12 * text.px)
    canvas.paste(_enlarged(_in_palette(scale, 0.0), (width, text.px)), (left, top))
    text.write(pen, (left, top + text.px), "low", width, DIM)
    end = round(_font(text.px).getlength("1"))
    text.write(pen, (left + width - end, top + text.px), "1", width, DIM)


def _marked(band: Band, size: tuple[int, int]) -> Image.Image:
    """The picture with a ring around the marked patch."""
    picture = Image.fromarray(band.picture).resize(size, Image.Resampling.LANCZOS)
    pen, radius = ImageDraw.Draw(picture), max(8, max(size) // 40)
    row, column = band.point
    x, y = column * size[0], row * size[1]
    box = (x - radius, y - radius, x + radius, y + radius)
    line = max(2, radius // 5)
    pen.ellipse(
        tuple(v + o * line for v, o in zip(box, (-1, -1, 1, 1), strict=True)),
        outline=WHITE,
        width=3 * line,
    )
    pen.ellipse(box, outline=(230, 30, 40), width=line)
    return picture


def _in_palette(
    values: Float[np.ndarray, "grid_height grid_width"], low: float
) -> Float[np.ndarray, "grid_height grid_width 3"]:
    """Colours of the values between ``low`` and 1."""
    scaled = np.clip((values - low) / max(1.0 - low, 1e-9), 0.0, 1.0)
    found: np.ndarray = matplotlib.colormaps[PALETTE](scaled)[..., :3]
    return found


def _enlarged(
    rgb: Float[np.ndarray, "grid_height grid_width 3"], size: tuple[int, int]
) -> Image.Image:
    """Colours in [0, 1] as pixels, each patch a rectangle."""
    pixels = Image.fromarray((rgb * 255).round().astype(np.uint8))
    return pixels.resize(size, Image.Resampling.NEAREST)
