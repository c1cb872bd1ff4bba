"""Features of pictures small enough for a page: enough to compare any two patches of one picture in a browser.

A network's patches are averaged to at most ``LONGER_PATCHES`` along the longer side and projected on the
``DIMENSIONS`` directions that hold most of their unit vectors, one byte each. What a run folder holds is decoded and
checked before it is on a page.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill.report.markup import Html, element
from distill.runfolder.files import replace_text
from distill.screen.picture_grid import PALETTE

HOVER = "features.json"  # beside features.png
LONGER_PATCHES, DIMENSIONS = 32, 16
PICTURE_PX = 320
MOST_BANDS, MOST_NETWORKS, MOST_BYTES = 64, 64, 20_000_000  # of a file
STOPS = 32  # colours of the palette
Packed = dict[str, Any]


def pack(patches: Float[Tensor, "grid_height grid_width width"], title: str) -> Packed:
    """One network's features of one picture: name, grid, and bytes in base64."""
    scale = min(1.0, LONGER_PATCHES / max(patches.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in patches.shape[:2])
    pooled = F.adaptive_avg_pool2d(
        F.normalize(patches, dim=-1).permute(2, 0, 1)[None], (height, width)
    )[0]
    rows = F.normalize(pooled.flatten(1).T.double(), dim=-1)
    _, _, directions = torch.linalg.svd(rows.T @ rows)
    small = F.normalize(rows @ directions[:DIMENSIONS].T, dim=-1)
    values = (small * 127).round().to(torch.int8).numpy().tobytes()
    return {"title": title, "grid": [height, width], "data": base64.b64encode(values).decode()}


def write_hover(path: Path, bands: Sequence[tuple[NDArray[np.uint8], list[Packed]]]) -> None:
    """Writes pictures and their packed features."""
    entries = [{"picture": _encoded(picture), "networks": found} for picture, found in bands]
    replace_text(path, json.dumps(entries))


def hover_parts(path: Path, address_of: Callable[[io.BytesIO], str | None]) -> list[Html]:
    """Elements of a page, one for each picture; none where the file is missing, damaged or of another form.

    Args:
        path: as ``write_hover`` wrote it.
        address_of: makes an address out of an encoded picture, None where it cannot be decoded.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            return []
        entries = json.loads(path.read_text(encoding="utf-8"))[:MOST_BANDS]
        return [_band(entry, address_of) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _band(entry: Mapping[str, Any], address_of: Callable[[io.BytesIO], str | None]) -> Html:
    source = address_of(io.BytesIO(base64.b64decode(entry["picture"], validate=True)))
    if source is None:
        raise ValueError("no picture")
    cells = [
        element(
            "figure",
            element("img", src=source, alt="a picture"),
            element("figcaption", "move over it"),
        )
    ]
    for network in entry["networks"][:MOST_NETWORKS]:
        height, width = (int(side) for side in network["grid"])
        values = base64.b64decode(network["data"], validate=True)
        if not (0 < height <= LONGER_PATCHES and 0 < width <= LONGER_PATCHES) or len(values) % (
            height * width
        ):
            raise ValueError("no grid")
        canvas = element(
            "canvas", width=width, height=height, data_features=base64.b64encode(values).decode()
        )
        cells.append(element("figure", canvas, element("figcaption", network["title"])))
    return element("div", *cells, class_="hover", hidden="hidden", data_palette=_palette())


def _palette() -> str:
    stops = matplotlib.colormaps[PALETTE](np.linspace(0.0, 1.0, STOPS))[:, :3]
    return bytes((stops * 255).round().astype(np.uint8).ravel()).hex()


def _encoded(picture: UInt8[np.ndarray, "height width 3"]) -> str:
    image, stream = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    image.save(stream, "WEBP", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
