"""Folders of custom students: ``config.json`` names the factory and its arguments, ``model.safetensors`` has the weights.

    model_type   distill_custom
    factory      module:function, transformers:NAME or timm:NAME
    args         its keyword arguments
    width        features
    stride       pixels per side of a patch

Nothing in such a folder is executable. The factory runs where it may: of a library, of a module in the folder that
the user stands in, but not in one folder there with the weights, or anywhere with ``--allow-code``
(``distill.listing.outside_code``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError
from distill.listing.outside_code import require_allowed
from distill.weights.containers import read_object
from distill.weights.hf_config import CUSTOM_TYPE
from students.custom import probe
from students.shapes import FACTORY, CustomSpec

CONFIG = "config.json"


def factory_of(path: Path) -> str:
    """The factory that the folder of a custom student names; empty for another network. Runs nothing.

    Args:
        path: the folder, or a file of weights in it.

    Raises:
        CheckpointError: ``config.json`` is damaged, or names none.
    """
    config, described = _described(path)
    if described.get("model_type") != CUSTOM_TYPE:
        return ""
    factory = described.get("factory")
    if not isinstance(factory, str) or not FACTORY.fullmatch(factory):
        raise CheckpointError(
            f"{config}: factory = {str(factory)[:60]!r}: must be module:function",
            fix="Export the student again.",
        )
    return factory


def custom_spec(path: Path) -> CustomSpec | None:
    """What the folder of a custom student holds, by its factory, which is run; None for another network.

    Args:
        path: the folder, or a file of weights in it.

    Raises:
        RecipeError: the factory lies where nothing runs without ``--allow-code``.
        CheckpointError: the factory is not there, or makes another network than the folder describes.
    """
    factory = factory_of(path)
    if not factory:
        return None
    config, described = _described(path)
    require_allowed(factory, f"{config}: factory", weights=config.parent)
    args = described.get("args")
    if not isinstance(args, dict):
        raise CheckpointError(
            f"{config}: args = {str(args)[:60]!r}: must be the arguments of {factory} by name",
            fix="Export the student again.",
        )
    try:
        spec = probe(factory, json.dumps(args, sort_keys=True))
    except ValueError as error:
        raise CheckpointError(
            f"{config}: {error}", fix="See docs/custom-students.md for what a factory returns."
        ) from error
    found = {"width": spec.width, "stride": spec.stride}
    for key, value in found.items():
        if described.get(key) != value:
            raise CheckpointError(
                f"{config}: {key} = {str(described.get(key))[:60]}, {factory} makes {value}",
                fix="Use the code that the student was trained with.",
            )
    return spec


def _described(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The config of the folder and what it holds; nothing where there is none."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    return config, read_object(config) if config.is_file() else {}
