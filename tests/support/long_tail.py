"""A long-tailed heap of pictures with copies, made of the bundled photographs, of which it is known what is a copy of what.

    heap/<photograph>/t0012.png              tiles; of the photograph of rank r about 1 / r^1.3 as many as of the first
    heap/<photograph>/t0012.exact.png        the same bytes
    heap/<photograph>/t0012.encoded.jpg      quality 50 to 95, of every second half the size
    heap/<photograph>/t0012.cropped.png      without a twentieth at each side: 10% of width and height

Tiles of one colour, and those with the pixels of another, are left out: what would be a copy of them is not known.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from distill.data.photographs import photograph_paths
from distill.runfolder.files import replaced

Kind = Literal["exact", "encoded", "cropped"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ZIPF = 1.3
FLAT_SPREAD = 2.0  # of 255 levels in every channel
QUALITIES = (50, 96)  # of a JPEG: from, to before
CROPPED = 0.05  # of each side
PARTS = ("bank", "query")  # of the test tiles
TEST_TILES = 20  # of a photograph
COPIED = 0.2  # of the tiles, by each kind


@dataclass(frozen=True)
class Evidence:
    """How many copies of a kind there are and were dropped; or, for all kinds, how many of the dropped are copies."""

    found: int
    of: int

    @property
    def share(self) -> float:
        """1 where there are none."""
        return self.found / self.of if self.of else 1.0


def write_heap(folder: Path, seed: int, tile: int = 64, test: Path | None = None) -> int:
    """Writes the heap and returns its number of files; the same seed writes the same.

    Every kind of copy is made of a fifth of the tiles, drawn separately, so that a tile may have several.
    With ``test`` a third of the tiles of each photograph, TEST_TILES at most, are no part of the heap: they are written there,
    half of them under ``bank`` and half under ``query``.
    """
    random = np.random.default_rng([seed, tile])
    tiles = {name: _tiles(path, tile) for name, path in photograph_paths().items()}
    names = sorted(filter(tiles.get, tiles), key=lambda name: (-len(tiles[name]), name))
    most, count, known = len(tiles[names[0]]), 0, set[bytes]()
    with replaced(folder) as heap:
        heap.mkdir()
        for rank, name in enumerate(names, start=1):
            wanted = max(2, round(most / rank**ZIPF))
            (heap / name).mkdir()
            order = random.permutation(len(tiles[name])).tolist()
            if test is not None:
                held_out = [order.pop() for _ in range(min(TEST_TILES, len(order) // 3))]
                _write_test(test, name, [tiles[name][index] for index in held_out])
            for index in order[:wanted]:
                pixels = tiles[name][index]
                digest = hashlib.sha256(pixels.tobytes()).digest()
                if digest not in known:
                    known.add(digest)
                    count += _write(heap / name / f"t{index:04}", Image.fromarray(pixels), random)
    return count


def _tiles(path: Path, tile: int) -> list[np.ndarray]:
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    height, width = (side // tile for side in pixels.shape[:2])
    cut = pixels[: height * tile, : width * tile].reshape(height, tile, width, tile, 3)
    tiles = cut.swapaxes(1, 2).reshape(-1, tile, tile, 3)
    spread = tiles.reshape(len(tiles), tile * tile, 3).astype(np.float32).std(axis=1).max(axis=1)
    return list(tiles[spread >= FLAT_SPREAD])


def _write_test(folder: Path, name: str, tiles: Sequence[np.ndarray]) -> None:
    for at, pixels in enumerate(tiles):
        part = folder / PARTS[at % 2] / name
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(part / f"{at}.png")


def _write(stem: Path, picture: Image.Image, random: np.random.Generator) -> int:
    """One tile and its copies; the number of files."""
    wanted = random.random(len(KINDS)) < COPIED
    quality, is_half = int(random.integers(*QUALITIES)), bool(random.integers(2))
    side = picture.width
    margin = round(CROPPED * side)
    half = picture.resize((side // 2, side // 2), Image.Resampling.BICUBIC) if is_half else picture
    inside = (margin, margin, side - margin, side - margin)
    writers = {
        ".png": lambda: _encoded(picture, "PNG"),
        ".exact.png": lambda: _encoded(picture, "PNG"),
        ".encoded.jpg": lambda: _encoded(half, "JPEG", quality=quality),
        ".cropped.png": lambda: _encoded(picture.crop(inside), "PNG"),
    }
    chosen = [name for name, is_wanted in zip(writers, (True, *wanted), strict=True) if is_wanted]
    for suffix in chosen:
        stem.with_name(stem.name + suffix).write_bytes(writers[suffix]())
    return len(chosen)


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def origin(path: str) -> str:
    """The tile that a file of the heap shows."""
    name = Path(path)
    return f"{name.parent.name}/{name.name.split('.')[0]}"


def kind_of(path: str) -> str:
    """What kind of copy a file of the heap is; empty for a tile itself."""
    parts = Path(path).name.split(".")
    return parts[1] if len(parts) > 2 else ""


def judge(paths: Sequence[str], twins: Sequence[int]) -> dict[str, Evidence]:
    """Recall by kind and, under ``precision``, the dropped images whose twin shows the same tile.

    ``twins`` has for each file the one that it was dropped for, or -1. A copy is found where twins lead from it and from
    the tile it was made of to the same file: which of them stays does not matter.
    """

    def stays(row: int) -> int:
        while twins[row] >= 0:
            row = twins[row]
        return row

    rows = {path: row for row, path in enumerate(paths)}
    of, found = Counter[str](), Counter[str]()
    for path, row in rows.items():
        if kind := kind_of(path):
            of[kind] += 1
            tile = rows[str(Path(path).with_name(Path(path).name.split(".")[0] + ".png"))]
            found[kind] += stays(row) == stays(tile)
    dropped = [row for row, twin in enumerate(twins) if twin >= 0]
    right = sum(origin(paths[row]) == origin(paths[twins[row]]) for row in dropped)
    return {kind: Evidence(found[kind], of[kind]) for kind in KINDS} | {
        "precision": Evidence(right, len(dropped))
    }
