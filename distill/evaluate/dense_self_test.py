"""The tasks of patch features on made-up pictures whose right scores are known in closed form.

    pictures   two colours side by side, in either order, 64 x 48 px for a network of 32 px: labels, picture and grid
               have three resolutions
    masks      the class of the colour, but every fourth row names the other one, and the border between the colours
               is ignored. A network can predict the colour only: IoU = 0.75 / (2 - 0.75) = 0.6
    depth      2 m and 4 m, every second pixel 22% nearer, the others 22% farther, half of the maps NPY and half PNG.
               A patch has the mean: RMSE = 0.22 sqrt((2^2 + 4^2) / 2), AbsRel = (0.22 / 1.22 + 0.22 / 0.78) / 2,
               d1 = 0.5, since 1.22 < 1.25 < 1 / 0.78
    points     16 colours, and the same in another order; 4 of 16 points name a wrong spot: PCK = 0.75

Set-ups that are wrong: masks reduced by nearest to a quarter of the side, which lose the fourth row and raise the score
to 1; maps of other pictures; points of other points; PNG taken for another unit; no final norm.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill.evaluate.files import evaluate_files
from distill.evaluate.scoring import Wanted
from distill.protocols.dense_tasks import DENSE

SIDE, PATCH = 32, 8  # of the network
WIDTH, HEIGHT = 64, 48
CELL_HW = HEIGHT * PATCH // SIDE, WIDTH * PATCH // SIDE  # of a patch in a picture
COUNTS = {"train": 24, "val": 8}
PAIRS, POINTS, WRONG_POINTS = 6, 16, 4
BLUE, RED = (40, 60, 200), (200, 60, 40)
BORDER_PX = 8  # on either side, where depth is that of neither colour after resizing
METRES, RIPPLE = (2.0, 4.0), 0.22
MILLIMETRES = 1000
IGNORED = 255
Say = Callable[[str], None]

RIGHT = {
    "seg mIoU": 0.75 / (2 - 0.75),
    "depth RMSE": RIPPLE * ((METRES[0] ** 2 + METRES[1] ** 2) / 2) ** 0.5,
    "depth AbsRel": (RIPPLE / (1 + RIPPLE) + RIPPLE / (1 - RIPPLE)) / 2,
    "depth d1": 0.5,
    "correspondence PCK@0.1": 1 - WRONG_POINTS / POINTS,
}
TOLERANCE = {"depth RMSE": 0.01, "depth AbsRel": 0.01}  # the ridge shrinks a little
EXACT = 1e-6


def found_scores(network: Path, data: Path, say: Say) -> dict[str, float]:
    """What the evaluation finds, under the names of ``RIGHT``; no number where it has a reason."""
    wanted = Wanted((), "quick", dense=tuple(DENSE))
    summary = evaluate_files([network], data, wanted, say, device=torch.device("cpu"))
    entries: dict[str, Any] = next(iter(summary["scores"].values()))
    nothing = float("nan")
    depth = entries["depth"].get("settings", {})
    return {
        "seg mIoU": entries["seg"].get("value", nothing),
        "depth RMSE": entries["depth"].get("value", nothing),
        "depth AbsRel": depth.get("AbsRel", nothing),
        "depth d1": depth.get("d1", nothing),
        "correspondence PCK@0.1": entries["correspondence"].get("value", nothing),
    }


def is_right(name: str, found: float) -> bool:
    """Whether a figure is the one that is known."""
    return abs(found - RIGHT[name]) < TOLERANCE.get(name, EXACT)


def write_dense(folder: Path) -> Path:
    """Pictures with masks and depth, and pairs of pictures with points."""
    for part, count in COUNTS.items():
        for index in range(count):
            is_blue = np.arange(WIDTH)[None].repeat(HEIGHT, 0) < WIDTH // 2
            is_blue = is_blue if index % 2 else ~is_blue
            _save(folder / "images" / part / f"{index}.png", _painted(is_blue))
            _save(folder / "masks" / part / f"{index}.png", _mask(is_blue))
            _save_depth(folder / "depth" / part / f"{index}", _depth(is_blue), is_png=index % 4 < 2)
    random, lines = np.random.default_rng(0), []
    for index in range(PAIRS):
        lines.append(_write_pair(folder, index, random))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _painted(is_blue: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.where(is_blue[..., None], np.array(BLUE), np.array(RED)).astype(np.uint8)


def _mask(is_blue: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Palette index 0 for blue, 1 for red."""
    classes = np.where(is_blue, 0, 1).astype(np.uint8)
    classes[::4] = 1 - classes[::4]
    classes[:, WIDTH // 2 - 1 : WIDTH // 2 + 1] = IGNORED
    return classes


def _depth(is_blue: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ripple = np.where((rows + columns) % 2, 1 + RIPPLE, 1 - RIPPLE)
    depth = np.where(is_blue, *METRES) * ripple
    depth[:, WIDTH // 2 - BORDER_PX : WIDTH // 2 + BORDER_PX] = 0
    return depth.astype(np.float32)


def _save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if pixels.ndim == 2 and pixels.dtype == np.uint8:
        image.putpalette([0, 0, 0, 128, 0, 0, *[0] * 756, 224, 224, 192][: 3 * 256])
    image.save(path)


def _save_depth(stem: Path, depth: NDArray[np.float32], *, is_png: bool) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if is_png:
        _save(stem.with_suffix(".png"), (depth * MILLIMETRES).round().astype(np.uint16))
    else:
        np.save(stem.with_suffix(".npy"), depth)


def _write_pair(folder: Path, index: int, random: np.random.Generator) -> dict[str, Any]:
    """Sixteen cells of one colour each, in two orders; the first points name a cell that is not theirs."""
    levels = np.array([30, 225])
    palette = np.stack(np.meshgrid(levels, levels, [30, 90, 160, 225]), axis=-1).reshape(-1, 3)
    orders = [random.permutation(POINTS) for _ in range(2)]
    names = []
    for side, order in zip("ab", orders, strict=True):
        cells = palette[order].reshape(SIDE // PATCH, SIDE // PATCH, 3).astype(np.uint8)
        names.append(f"pairs/{index}-{side}.png")
        _save(folder / names[-1], cells.repeat(CELL_HW[0], 0).repeat(CELL_HW[1], 1))
    points = []
    for colour in range(POINTS):
        at = [int(np.flatnonzero(order == colour)[0]) for order in orders]
        at[1] = (at[1] + POINTS // 2) % POINTS if colour < WRONG_POINTS else at[1]
        off = random.uniform(-3, 3, 2)  # of the centre, less than the threshold of 6.4
        points.append([float(v) for cell in at for v in _centre(cell) + off])
    return {"a": names[0], "b": names[1], "points": points}


def _centre(cell: int) -> NDArray[np.float64]:
    row, column = divmod(cell, SIDE // PATCH)
    return np.array([(column + 0.5) * CELL_HW[1], (row + 0.5) * CELL_HW[0]])


def reduce_masks(data: Path, folder: Path) -> Path:
    """The same with masks that were reduced to a quarter of the side by nearest, and enlarged again."""
    shutil.copytree(data, folder)
    for path in folder.glob("masks/*/*.png"):
        with Image.open(path) as mask:
            small = mask.resize((WIDTH // 4, HEIGHT // 4), Image.Resampling.NEAREST)
            restored = small.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        restored.save(path)
    return folder


def mix_maps(data: Path, folder: Path) -> Path:
    """The same with training maps and second points in another order."""
    shutil.copytree(data, folder)
    random = np.random.default_rng(1)
    for kind in ("masks", "depth"):
        paths = sorted((folder / kind / "train").iterdir())
        contents = [path.read_bytes() for path in paths]
        order = random.permutation(len(paths))
        for path, index in zip(paths, order, strict=True):
            path.unlink()
            path.with_suffix(paths[index].suffix).write_bytes(contents[index])
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for line in lines:
        seconds = [point[2:] for point in line["points"]]
        turned = seconds[1:] + seconds[:1]
        line["points"] = [[*p[:2], *q] for p, q in zip(line["points"], turned, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def change_unit(data: Path, folder: Path) -> Path:
    """The same with a unit of depth that is not that of the PNG files."""
    shutil.copytree(data, folder)
    (folder / "dense.json").write_text(json.dumps({"metres": 1 / 5000}))
    return folder
