"""How given weights want their images: what the files beside them, or their official name, state.

    preprocessor_config.json   of a Hugging Face folder: image_mean, image_std, size
    config.json                of timm: pretrained_cfg
    the name of the file       Meta's satellite networks have another mean and standard deviation

Stated in units of images from 0 to 1, whatever factor the file scales them by.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError
from distill.weights.containers import read_object
from distill.weights.initial import InitKeys, find_initial

PREPARATION = "preprocessor_config.json"
SATELLITE = ("sat493m", "eadcf0ff", "a6675841")  # in the names of released files
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
LARGEST_SIDE = 16_384  # pixels
Stats = tuple[float, float, float]


@dataclass(frozen=True)
class StatedInputs:
    """Side in pixels, RGB mean and standard deviation, and the file that states them; None and '' where none does."""

    size: int | None = None
    mean: Stats | None = None
    std: Stats | None = None
    source: str = ""


def stated_inputs(weights: Path) -> StatedInputs:
    """What is stated about the images of a network.

    Args:
        weights: a folder or a file.

    Raises:
        CheckpointError: a file beside the weights is damaged or states what no network can use.
    """
    folder = weights if weights.is_dir() else weights.parent
    path = folder / PREPARATION
    if path.is_file():
        return _of_processor(path, read_object(path))
    config = folder / "config.json"
    described = read_object(config) if config.is_file() else {}
    theirs = described.get("pretrained_cfg")
    if isinstance(theirs, dict) and {"mean", "std"} <= theirs.keys():
        mean, std = (_stats(config, theirs, key, 1.0) for key in ("mean", "std"))
        sides = theirs.get("input_size")
        size = sides[-1] if isinstance(sides, list) and sides else None
        return StatedInputs(_side(config, size), mean, std, config.name)
    if any(part in weights.name for part in SATELLITE):
        return StatedInputs(None, SATELLITE_MEAN, SATELLITE_STD, weights.name)
    return StatedInputs()


def inputs_of_init(init: InitKeys) -> StatedInputs | None:
    """What is stated about the images of the weights that a network starts from; None where they are gone.

    Raises:
        CheckpointError: as ``stated_inputs``.
    """
    try:
        weights = find_initial("init", init).weights
    except CheckpointError:
        return None
    return stated_inputs(weights)


def _of_processor(path: Path, config: Mapping[str, Any]) -> StatedInputs:
    size = config.get("crop_size") if config.get("do_center_crop") else config.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    side = _side(path, size)
    if config.get("do_normalize") is False:
        return StatedInputs(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), path.name)
    if not {"image_mean", "image_std"} & config.keys():
        return StatedInputs(side, source=path.name)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise _unusable(path, "rescale_factor", factor)
    unit = 255 * factor
    mean, std = (_stats(path, config, key, unit) for key in ("image_mean", "image_std"))
    return StatedInputs(side, mean, std, path.name)


def _stats(path: Path, config: Mapping[str, Any], key: str, unit: float) -> Stats:
    """Three numbers, in units of images from 0 to 1."""
    values = config.get(key)
    is_triple = isinstance(values, list) and len(values) == 3
    if not is_triple or not all(isinstance(v, int | float) for v in values or ()):
        raise _unusable(path, key, values)
    if key.endswith("std") and not all(v > 0 for v in values or ()):
        raise _unusable(path, key, values)
    first, second, third = (v if abs(unit - 1) < 1e-6 else v / unit for v in values or ())
    return float(first), float(second), float(third)


def _side(path: Path, size: object) -> int | None:
    if size is None or (type(size) is int and 1 <= size <= LARGEST_SIDE):
        return size
    raise _unusable(path, "size", size)


def _unusable(path: Path, key: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} = {repr(value)[:60]} cannot be used for images of three colours",
        fix="Repair it, or remove the file and write data.mean and data.std in the recipe.",
    )
