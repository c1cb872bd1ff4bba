"""Pictures with a map each, ready to score on, and a network as a source of patch features.

A map is never resized: one of another size than its picture is left out, and both sizes are named, since masks that
were reduced score lower than the network deserves (Franca#2: 6.6 points of mIoU at 100 px).
"""

from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.locations import Location, Reader
from distill.data.maps import decode_depth, decode_mask
from distill.errors import DataError
from distill.listing.decode import reason_of
from distill.listing.held import Held
from distill.listing.limit import in_order
from distill.listing.map_pairs import MapFolder, MapKind, MapPair, list_map_pairs
from distill.protocols.images import MOST_BYTES, PICTURE_LIMIT_S, READERS, LeftOut, Preparation
from distill.protocols.score import CannotScoreError, Protocol
from teacher.batch import normalise

MOST: dict[Protocol, tuple[int, int]] = {"quick": (300, 100), "dinov3": (1 << 40, 1 << 40)}
NEAREST, FARTHEST = 0.001, 10.0  # m, of pixels that count
IGNORED = -1  # class of a pixel that is neither trained on nor scored


@dataclass(frozen=True)
class PatchNetwork:
    """A backbone on its device, in evaluation mode, and how it wants its pictures."""

    backbone: nn.Module
    preparation: Preparation
    stride: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def patches(
        self, images: UInt8[Tensor, "images 3 height across"]
    ) -> Float[Tensor, "images width rows columns"]:
        """Patch features after the final norm, fp32 on the device. Sides are multiples of the stride."""
        how = self.preparation
        pixels = normalise(images.to(self.device), how.mean, how.std, dtype=torch.float32)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = self.backbone(pixels)
        return found.patch_tokens.float().transpose(1, 2).unflatten(2, found.grid_hw)


@dataclass(frozen=True)
class MapSet:
    """Pairs that can be used; ``values``: of a map, the class index of every pixel or ``IGNORED``, or metres or 0.

    ``labels``: those that occur, in the order of their index; none of depth.
    """

    train: tuple[MapPair, ...]
    test: tuple[MapPair, ...]
    pictures: Held
    values: Held
    labels: tuple[int, ...]
    settings: dict[str, Any]
    left_out: tuple[LeftOut, ...]


def list_maps(source: Path, kind: MapKind, protocol: Protocol) -> MapFolder:
    """At most ``MOST`` pairs of either part, evenly spaced.

    Raises:
        CannotScoreError: there are none, or torchmetrics is missing.
    """
    if find_spec("torchmetrics") is None:
        raise CannotScoreError('wants torchmetrics: pip install "distill-family[dense]"')
    try:
        folder = list_map_pairs(source, kind)
    except DataError as error:
        raise CannotScoreError(error.message) from error
    pairs = list[MapPair]()
    for is_held_out, most in zip((False, True), MOST[protocol], strict=True):
        part = [each for each in folder.pairs if each.is_held_out is is_held_out]
        chosen = np.linspace(0, len(part) - 1, min(len(part), most)).round().astype(int)
        pairs += [part[index] for index in chosen.tolist()]
    return replace(folder, pairs=tuple(pairs))


def open_maps(folder: MapFolder, kind: MapKind, pictures: Held) -> MapSet:
    """Reads every map and its picture once; what cannot be used is left out.

    Raises:
        CannotScoreError: nothing to train on or to score is left, or masks name one class.
    """
    reader = Reader(limit_s=PICTURE_LIMIT_S)

    def read(location: Location) -> NDArray[Any]:
        encoded = reader.read(location)
        return decode_mask(encoded) if kind == "mask" else decode_depth(encoded, folder.metres)

    def examine(pair: MapPair) -> LeftOut | tuple[set[int], str]:
        try:
            values, (height, width) = read(pair.map), pictures(pair.picture).shape[:2]
        except OSError as error:
            return LeftOut(str(pair.map), f"it or its picture cannot be used: {reason_of(error)}")
        size = f"{width} x {height} px"
        if values.shape != (height, width):
            other = f"is {values.shape[1]} x {values.shape[0]} px, its picture {size}"
            return LeftOut(str(pair.map), f"{other}; maps are never resized")
        if kind == "mask":
            counted = set(np.unique(values).tolist()) - folder.ignored
        else:
            counted = {0} if ((values >= NEAREST) & (values <= FARTHEST)).any() else set()
        return (counted, size) if counted else LeftOut(str(pair.map), "no pixel of it counts")

    found = list(in_order(examine, folder.pairs, READERS))
    left_out = tuple(each for each in found if isinstance(each, LeftOut))
    usable = [
        (p, *each)
        for p, each in zip(folder.pairs, found, strict=True)
        if not isinstance(each, LeftOut)
    ]
    good = [pair for pair, _, _ in usable]
    train, test = (tuple(p for p in good if p.is_held_out is part) for part in (False, True))
    if not train or not test:
        counts = f"{len(train)} pictures to learn from and {len(test)} held out have a {kind} map"
        raise CannotScoreError(f"{counts} that can be used, {len(left_out)} were left out")
    labels = tuple(sorted({label for _, counted, _ in usable for label in counted}))
    if kind == "mask" and len(labels) < 2:
        raise CannotScoreError(f"the masks name {len(labels)} class, two are the least")

    def indexed(location: Location) -> NDArray[Any]:
        values = read(location)
        if kind == "depth":
            return values
        index = np.searchsorted(labels, values).clip(0, len(labels) - 1)
        return np.where(np.take(labels, index) == values, index, IGNORED).astype(np.int16)

    settings = {"train": len(train), "held out": len(test), "layout": folder.layout}
    sizes = Counter(size for pair, _, size in usable if pair.is_held_out)
    others = f" and {len(sizes) - 1} other sizes" if len(sizes) > 1 else ""
    settings |= {"maps": f"as stored, {sizes.most_common(1)[0][0]}{others}"}
    if folder.num_without:
        settings |= {"without a map": folder.num_without}
    if kind == "mask":
        settings |= {"classes": len(labels), "ignored": "/".join(map(str, sorted(folder.ignored)))}
    held = Held(indexed, (pair.map for pair in good), MOST_BYTES)
    return MapSet(train, test, pictures, held, labels, settings, left_out)
