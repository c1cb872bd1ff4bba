"""Pictures with a map each (masks of classes, depth) in plain folders, and pairs of pictures with key points.

    images/…/x.jpg     annotations/…/x.png       as ADE20k, label 0 is ignored as in its published scores; or masks/
    JPEGImages/x.jpg   SegmentationClass/x.png   as VOC; ImageSets/Segmentation/val.txt names what is held out
    images/ or rgb/    depth/…/x.npy or x.png    also x_depth.png
    x.jpg              x.png or x.npy beside it  also x_mask.png, x_depth.png; rgb_1.jpg and sync_depth_1.png as NYUv2

A folder ``val`` or ``test`` is held out, else a fifth by a fixed hash. ``dense.json`` beside the folders may state
``ignore`` (labels) and ``metres`` (of one level of a PNG).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from distill.errors import DataError
from distill.listing.labels import HELD_OUT
from distill.listing.locations import Kind, Location
from distill.listing.walk import walk

MapKind = Literal["mask", "depth"]
FOLDERS: Mapping[MapKind, tuple[tuple[str, str], ...]] = {
    "mask": (("images", "annotations"), ("images", "masks"), ("JPEGImages", "SegmentationClass")),
    "depth": (("images", "depth"), ("rgb", "depth")),
}
BESIDE = "beside each other"
SUFFIXES: Mapping[MapKind, tuple[str, ...]] = {"mask": (".png",), "depth": (".npy", ".png")}
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
NO_CLASS, OF_ADE = 255, 0
MILLIMETRE = 0.001
FRACTION = 0.2  # held out where nothing is stated
SETTINGS, PAIRS = "dense.json", "pairs.jsonl"


@dataclass(frozen=True)
class MapPair:
    """A picture, the file of its map, and whether it is held out."""

    picture: Location
    map: Location
    is_held_out: bool


@dataclass(frozen=True)
class MapFolder:
    """What a folder holds. ``pictures``: the folder of all pictures; ``maps``: paths of all maps; ``num_without``: pictures without one."""

    layout: str
    pictures: Path
    pairs: tuple[MapPair, ...]
    num_without: int
    maps: frozenset[str]
    ignored: frozenset[int]
    metres: float


@dataclass(frozen=True)
class PointPair:
    """Two pictures and key points that show the same, [x, y, other x, other y] in pixels; ``box`` of the second: left, top, right, bottom."""

    pictures: tuple[Location, Location]
    points: tuple[tuple[float, ...], ...]
    box: tuple[float, ...] | None


def list_map_pairs(source: Path, kind: MapKind) -> MapFolder:
    """Every picture of a folder that has a map.

    Raises:
        DataError: it is no folder, no picture has a map, or ``dense.json`` cannot be used.
    """
    if not source.is_dir():
        raise DataError(f"{source}: not a folder, {kind} maps are read from plain folders")
    names = [Path(name) for name in walk(str(source)).files]
    settings = _settings(source / SETTINGS)
    for first, second in FOLDERS[kind]:
        pictures = {_key(n, first, kind): n for n in names if _is_in(n, first, PICTURES)}
        maps = {_key(n, second, kind): n for n in names if _is_in(n, second, SUFFIXES[kind])}
        if pictures.keys() & maps.keys():
            root, layout = source / first, f"{first}/ and {second}/"
            break
    else:
        root, layout, first = source, BESIDE, ""
        maps = {_key(n, "", kind): n for n in names if _is_map(n, kind, frozenset(names))}
        others = [n for n in names if n.suffix.lower() in PICTURES and n not in maps.values()]
        pictures = {_key(n, "", kind): n for n in others}
    both = [key for key in pictures if key in maps]
    if not both:
        raise DataError(f"{source}: no picture has a {kind} map ({' or '.join(SUFFIXES[kind])})")
    held_out = _held_out(source, both)
    pairs = (
        MapPair(
            Location(Kind.FILE, str(root), str(pictures[key].relative_to(first))),
            Location(Kind.FILE, str(source), str(maps[key])),
            key in held_out,
        )
        for key in both
    )
    ignored = settings.get("ignore", [NO_CLASS, *([OF_ADE] if "annotations" in layout else [])])
    scale = float(settings.get("metres", MILLIMETRE))
    without = len(pictures) - len(both)
    paths = frozenset(str(source / name) for name in maps.values())
    return MapFolder(layout, root, tuple(pairs), without, paths, frozenset(ignored), scale)


def _is_in(name: Path, folder: str, suffixes: Iterable[str]) -> bool:
    return name.parts[0] == folder and name.suffix.lower() in suffixes


def _is_map(name: Path, kind: MapKind, names: frozenset[Path]) -> bool:
    """An NPY file, a PNG that is named as a map, or one beside a picture of its name."""
    suffix = name.suffix.lower()
    if suffix not in SUFFIXES[kind] or suffix == ".npy":
        return suffix in SUFFIXES[kind]
    is_named = name.stem.endswith(f"_{kind}") or name.stem.startswith("sync_depth_")
    return is_named or any(name.with_suffix(each) in names for each in PICTURES - {".png"})


def _key(name: Path, folder: str, kind: MapKind) -> str:
    """What a picture and its map have in common."""
    stem = name.stem.removesuffix(f"_{kind}").removeprefix("sync_depth_").removeprefix("rgb_")
    return str(name.relative_to(folder).with_name(stem))


def _held_out(source: Path, keys: Iterable[str]) -> set[str]:
    """Those that a list of VOC or a folder holds out; a fifth by the hash of its name where nothing does, or all would be."""
    listed = source / "ImageSets" / "Segmentation" / "val.txt"
    known = set(keys)
    if listed.is_file():
        found = known & set(listed.read_text(encoding="utf-8").split())
    else:
        found = {key for key in known if any(p.lower() in HELD_OUT for p in Path(key).parts[:-1])}
    if found and found < known:
        return found
    order = sorted(known, key=lambda key: (crc32(os.fsencode(key)), key))
    return set(order[: max(1, round(FRACTION * len(order)))])


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_good = found.keys() <= {"ignore", "metres"}
        is_good &= all(type(label) is int for label in found.get("ignore", []))
        is_good &= float(found.get("metres", 1)) > 0
    except (ValueError, TypeError, AttributeError):
        is_good = False
    if not is_good:
        raise DataError(f'{path}: not as {{"ignore": [0, 255], "metres": 0.001}}')
    return dict(found)


def list_point_pairs(source: Path) -> tuple[list[PointPair], list[tuple[str, str]]]:
    """The pairs of ``pairs.jsonl``, and each line that cannot be used with the reason.

    Raises:
        DataError: there is no such file.
    """
    path = source / PAIRS
    if not path.is_file():
        raise DataError(f"{path}: missing, it names pairs of pictures and their key points")
    found, bad = list[PointPair](), list[tuple[str, str]]()
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_point_pair(source, json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            wanted = '{"a": "x.jpg", "b": "y.jpg", "points": [[x, y, x of b, y of b]]}'
            bad.append((f"{path}:{index}", f"not as {wanted}"))
    return found, bad


def _point_pair(source: Path, line: Any) -> PointPair:
    one, other = (Location(Kind.FILE, str(source), str(Path(line[key]))) for key in ("a", "b"))
    points = tuple(tuple(float(value) for value in point) for point in line["points"])
    box = None if line.get("box") is None else tuple(float(value) for value in line["box"])
    if not points or any(len(point) != 4 for point in points) or (box and len(box) != 4):
        raise ValueError
    if box and (box[2] <= box[0] or box[3] <= box[1]):
        raise ValueError
    return PointPair((one, other), points, box)
