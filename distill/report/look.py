"""``distill look``: pictures beside maps of what networks see in them, at any size, and over the checkpoints of a run.

A network is loaded, timed on a small picture and let go; then time and memory are reported, and only then does the
work begin, one network after the other.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from distill.data.locations import Location, Reader
from distill.data.photographs import photograph_paths
from distill.errors import DataError, RecipeError, SetupError
from distill.evaluate.forward_cost import BYTES_FP32, CostModel, ForwardCost, available_bytes
from distill.evaluate.patch_maps import fit, fitted_hw, patch_features, tile_shapes
from distill.listing.decode import Rgb, decode_rgb, reason_of
from distill.protocols.images import PICTURE_LIMIT_S, Preparation
from distill.report.pictures import PictureMaps
from distill.screen.picture_grid import Band, Column, Point, render
from distill.screen.words import duration
from students.shapes import BackboneSpec

LEAST_PX, LARGEST_PX = 32, 4096
REPORT_EVERY_S = 5.0
BUILTIN = "builtin:"  # before the name of a bundled photograph
FEATURE_COPIES = 6  # of the patch features in fp32: as computed, blended, centred in fp64
PIXEL_COPIES = 3  # of the picture in bytes
Say = Callable[[str], None]


@dataclass(frozen=True)
class Viewed:
    """A network to look through. ``group``: networks of one group stand side by side."""

    title: str
    load: Callable[[], nn.Module]
    spec: BackboneSpec | None
    preparation: Preparation
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class LookRequest:
    """How to look. ``size_px``: the longer side. ``points``: one for each picture, None for the middle of its foreground."""

    size_px: int
    tile_px: int | None = None
    has_foreground: bool = True
    points: Sequence[Point | None] = ()


@dataclass(frozen=True)
class NamedPicture:
    """A picture as it is decoded: upright, RGB."""

    name: str
    pixels: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class LookCost:
    """What all of it is estimated to take: seconds by network and picture, operations, and bytes at the highest moment."""

    seconds: Mapping[tuple[int, int], float]
    tflop: float = 0.0
    num_bytes: float = 0.0


def check_request(size_px: int, tile_px: int | None, out: Path) -> None:
    """Refuses what cannot be done, before anything is read.

    Raises:
        RecipeError: a size or the file to write is out of range.
    """
    if not LEAST_PX <= size_px <= LARGEST_PX:
        fix = f"Give {LEAST_PX} to {LARGEST_PX} px, for the longer side."
        raise RecipeError(f"--size {size_px}: not a size to look at", fix=fix)
    if tile_px is not None and not LEAST_PX <= tile_px <= LARGEST_PX:
        fix = f"Give {LEAST_PX} to {LARGEST_PX} px."
        raise RecipeError(f"--tile-size {tile_px}: not a size of a tile", fix=fix)
    if out.suffix.lower() != ".png":
        raise RecipeError(f"--out {out}: a PNG is written", fix=f"Write -o {out.stem}.png.")
    if not out.parent.is_dir():
        raise RecipeError(f"--out {out}: no folder {out.parent}", fix="Make it first.")


def parse_points(texts: Sequence[str], pictures: Sequence[NamedPicture]) -> list[Point | None]:
    """Row and column in fractions of each picture from ``X,Y``: fractions if a number has a decimal point, else pixels.

    Raises:
        RecipeError: it is no point of the picture, or there is not one for all or one for each.
    """
    if not texts:
        return [None] * len(pictures)
    if len(texts) not in (1, len(pictures)):
        fix = "Give --at once, or once for each picture."
        raise RecipeError(f"--at: {len(texts)} points for {len(pictures)} pictures", fix=fix)
    given = texts if len(texts) > 1 else [texts[0]] * len(pictures)
    return [_point(text, picture) for text, picture in zip(given, pictures, strict=True)]


def _point(text: str, picture: NamedPicture) -> Point:
    height, width = picture.pixels.shape[:2]
    fix = f"Give 0.5,0.5 in fractions, or pixels from 0,0 to {width - 1},{height - 1}."
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"--at {text}: not a point", fix=fix) from error
    if "." not in text:
        x, y = (x + 0.5) / width, (y + 0.5) / height
    if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):
        size = f"{width} x {height} px"
        raise RecipeError(f"--at {text}: not in {picture.name} of {size}", fix=fix)
    return y, x


def read_pictures(words: Sequence[str], background: Rgb | None) -> list[NamedPicture]:
    """Pictures by path, or bundled photographs as ``builtin:NAME``; EXIF turns them upright, clear pixels lie on ``background``.

    Raises:
        DataError: one cannot be used; names it and the reason.
    """
    reader, bundled = Reader(limit_s=PICTURE_LIMIT_S), photograph_paths()
    pictures = []
    for word in words:
        name = word.removeprefix(BUILTIN)
        if word.startswith(BUILTIN) and name not in bundled:
            fix = f"Bundled photographs: {', '.join(bundled)}."
            raise DataError(f"{word}: no such photograph", fix=fix)
        path = bundled[name] if word.startswith(BUILTIN) else Path(word)
        try:
            if path.is_dir():
                raise OSError("a folder")
            pixels = decode_rgb(reader.read(Location.of(path)), background)
        except OSError as error:
            fix = f"Give pictures, such as {word.rstrip('/')}/*.jpg." if path.is_dir() else ""
            raise DataError(
                f"{word}: cannot be used as a picture ({reason_of(error)})",
                fix=fix or "Give a file that Pillow reads, such as a JPEG or PNG.",
            ) from error
        pictures.append(NamedPicture(path.stem if name != word else path.name, pixels))
    return pictures


def look(
    pictures: Sequence[NamedPicture],
    networks: Sequence[Viewed],
    request: LookRequest,
    out: Path,
    say: Say,
    device: torch.device,
) -> dict[str, Any]:
    """Writes ``out``, and returns what it took and the cosines that are in it.

    Raises:
        SetupError: the memory of the device does not hold the largest picture; before anything is computed.
    """
    cost = _estimate(pictures, networks, request, say, device)
    progress = _Progress(cost, say)
    points = request.points or [None] * len(pictures)
    maps = [PictureMaps(each, has_foreground=request.has_foreground) for each in points]
    found: dict[tuple[int, str], list[Column]] = {}
    began = time.monotonic()
    for index, network in enumerate(networks):
        backbone = network.load().to(device)
        stride = int(backbone.stride)  # type: ignore[arg-type]
        for turn, picture in enumerate(pictures):
            fitted = fit(picture.pixels, request.size_px, stride)
            progress.begin((index, turn), f"{network.title} on {picture.name}")
            patches = patch_features(
                backbone,
                fitted,
                network.preparation,
                tile_px=request.tile_px,
                on_part=progress.report,
            )
            note = f"{patches.shape[2]} wide, {patches.shape[1]} x {patches.shape[0]} patches"
            note = f"{network.note}, {note}" if network.note else note
            column = maps[turn].add(patches, network.title, note)
            found.setdefault((turn, network.group), []).append(column)
    seconds = time.monotonic() - began
    bands = [
        _band(pictures[turn], maps[turn], found[turn, group], group, request)
        for turn, group in sorted(found, key=lambda key: key[0])
    ]
    render(bands, out)
    return _facts(pictures, maps, found, cost, seconds) | {"picture": str(out)}


def _band(
    picture: NamedPicture,
    maps: PictureMaps,
    columns: Sequence[Column],
    group: str,
    request: LookRequest,
) -> Band:
    height, width = picture.pixels.shape[:2]
    title = f"{group}: {picture.name}" if group else picture.name
    note = f"{width} x {height} px, at {request.size_px} px"
    if request.has_foreground and maps.foreground is None:
        note += ", no foreground found"
    return Band(picture.pixels, maps.point, title, note, columns)


def _estimate(
    pictures: Sequence[NamedPicture],
    networks: Sequence[Viewed],
    request: LookRequest,
    say: Say,
    device: torch.device,
) -> LookCost:
    """Reports time, memory and sizes; networks of one shape are timed once.

    Raises:
        SetupError: the memory does not suffice.
    """
    models = dict[Any, tuple[CostModel, int, int]]()
    costs, num_bytes, sizes = dict[tuple[int, int], ForwardCost](), 0.0, dict[str, None]()
    for index, network in enumerate(networks):
        key = network.spec or network.title
        if key not in models:
            backbone = network.load().to(device)
            stride, width = int(backbone.stride), int(backbone.width)  # type: ignore[arg-type]
            models[key] = CostModel(backbone, network.spec, request.size_px, device), stride, width
        model, stride, width = models[key]
        for turn, picture in enumerate(pictures):
            hw = fitted_hw(picture.pixels.shape[:2], request.size_px, stride)
            found = model.of(tile_shapes(hw, request.tile_px, stride))
            features = FEATURE_COPIES * BYTES_FP32 * width * hw[0] * hw[1] / stride**2
            features += PIXEL_COPIES * 3 * hw[0] * hw[1]
            costs[index, turn] = found
            num_bytes = max(num_bytes, found.num_bytes + features)
            sizes.setdefault(_size_line(picture, hw, request, stride))
    for line in sizes:
        say(line)
    tflop = sum(each.tflop or 0.0 for each in costs.values())
    cost = LookCost({key: each.seconds for key, each in costs.items()}, tflop, num_bytes)
    _require_memory(cost, request, say, device)
    return cost


def _require_memory(cost: LookCost, request: LookRequest, say: Say, device: torch.device) -> None:
    free = available_bytes(device)
    say(
        f"about {duration(max(1.0, sum(cost.seconds.values())))} ({cost.tflop:.3g} TFLOP), "
        f"{cost.num_bytes / 2**30:.2f} GiB of memory at most, {free / 2**30:.1f} GiB free on {device.type}"
    )
    if cost.num_bytes > free:
        raise SetupError(
            f"--size {request.size_px}: takes about {cost.num_bytes / 2**30:.1f} GiB of memory on {device.type}, "
            f"{free / 2**30:.1f} GiB are free",
            fix=f"Take --size {request.size_px // 2}, or --tiles."
            if request.tile_px is None
            else f"Take --size {request.size_px // 2}, or smaller tiles: --tile-size.",
        )


def _size_line(
    picture: NamedPicture, hw: tuple[int, int], request: LookRequest, stride: int
) -> str:
    """The size that a picture is looked at, and why it is not the one that was requested."""
    height, width = picture.pixels.shape[:2]
    line = f"{picture.name}: {width} x {height} px, looked at as {hw[1]} x {hw[0]} px"
    if max(hw) != request.size_px:
        line += f" ({request.size_px} is rounded to a multiple of the patch, {stride} px)"
    if max(hw) > max(height, width):
        line += ", enlarged"
    return line


class _Progress:
    """Reports what is done and the time left, from the estimates and how far they were off up to now."""

    def __init__(self, cost: LookCost, say: Say) -> None:
        self._seconds, self._say, self._done_s = cost.seconds, say, 0.0
        self._part_s, self._what = 0.0, ""
        self._began = self._last = time.monotonic()

    def begin(self, key: tuple[int, int], what: str) -> None:
        """The next network and picture; what was before is done."""
        self._done_s += self._part_s
        self._part_s, self._what = self._seconds[key], what

    def report(self, done: float) -> None:
        """At most every ``REPORT_EVERY_S``; ``done`` is the part of this network and picture."""
        now = time.monotonic()
        if now - self._last < REPORT_EVERY_S:
            return
        self._last = now
        total, ready = sum(self._seconds.values()), self._done_s + done * self._part_s
        left_s = (now - self._began) / max(ready, 1e-9) * (total - ready)
        self._say(f"{self._what}: {ready / total:.0%} of all, {duration(left_s)} left")


def _facts(
    pictures: Sequence[NamedPicture],
    maps: Sequence[PictureMaps],
    found: Mapping[tuple[int, str], Sequence[Column]],
    cost: LookCost,
    seconds: float,
) -> dict[str, Any]:
    """As ``--json`` prints it."""
    return {
        "pictures": {
            picture.name: {
                "at": [maps[turn].point[1], maps[turn].point[0]],
                "foreground": None
                if (mask := maps[turn].foreground) is None
                else float(mask.float().mean()),
                "lowest_cosine": {
                    f"{group}: {column.title}" if group else column.title: float(
                        column.similarity.min()
                    )
                    for (at, group), columns in found.items()
                    if at == turn
                    for column in columns
                },
            }
            for turn, picture in enumerate(pictures)
        },
        "seconds": seconds,
        "estimated_s": sum(cost.seconds.values()),
        "tflop": cost.tflop,
        "estimated_bytes": round(cost.num_bytes),
    }
