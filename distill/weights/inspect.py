"""Describes a file or folder of weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError
from distill.weights.containers import PICKLED, is_finite, open_weights
from distill.weights.heads import holds_heads
from distill.weights.identity import Identity
from distill.weights.load import identify_layout
from distill.weights.stated_inputs import stated_inputs
from students.shapes import BackboneSpec

# First eight hex digits of the sha256 of the released files, as in their names
RELEASED = {
    "08c60483": "vits16",
    "4057cbaa": "vits16plus",
    "73cec8be": "vitb16",
    "8aa4cbdd": "vitl16",
    "7c1da9a5": "vith16plus",
    "a955f4ea": "vit7b16",
    "21b726bb": "convnext_tiny",
    "296db49d": "convnext_small",
    "801f2ba9": "convnext_base",
    "61fa432d": "convnext_large",
    "eadcf0ff": "vitl16 (satellite)",
    "a6675841": "vit7b16 (satellite)",
}


@dataclass(frozen=True)
class Inspection:
    """What a file is, in words and numbers. ``has_nan`` is None where values were not read."""

    path: str
    what: str
    layout: str | None
    arch: str | None
    released: str | None
    parameters: int
    tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    has_heads: bool
    has_nan: bool | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect(path: Path, *, check_values: bool = False, prefix: str | None = None) -> Inspection:
    """Names what a file or folder is; reads all values only on request.

    ``prefix``: before the names of the backbone that is meant, where the file holds several.

    Raises:
        CheckpointError: it cannot be read at all. A readable file of something else is described.
    """
    container = open_weights(path)
    identity: Identity | None = None
    notes: list[str] = []
    try:
        identity = identify_layout(container, prefix=prefix)
    except CheckpointError as error:
        notes += [error.message.removeprefix(f"{container.path}: "), error.fix]
    heads = holds_heads(container)
    if identity is None:
        what = "heads" if heads else "no backbone that can be used"
        notes = [] if heads else notes
    else:
        what = "training file: backbone and heads" if heads else "backbone"
        notes += [*identity.notes, *_unusual(identity.spec), *_images(path)]
        if not heads:
            notes.append("no heads: as a teacher it needs heads: fit or heads: none")
        if identity.ignored:
            notes.append(
                f"{len(identity.ignored)} tensors are not needed, first {identity.ignored[0]}"
            )
    has_nan = None
    if check_values:
        has_nan = any(
            tensor.is_floating_point() and not is_finite(tensor)
            for tensor in map(container.read, container.shapes)
        )
    known = [arch for digits, arch in RELEASED.items() if digits in path.name]
    return Inspection(
        path=str(path),
        what=what,
        layout=identity.layout if identity else None,
        arch=(identity.arch or "free size") if identity else None,
        released=known[0] if known else None,
        parameters=sum(math.prod(shape) for shape in container.shapes.values()),
        tensors=len(container.shapes),
        num_bytes=sum(file.stat().st_size for file in _files_of(path)),
        dtypes=tuple(sorted(set(container.dtypes.values()))),
        has_heads=heads,
        has_nan=has_nan,
        notes=tuple(notes),
    )


def _unusual(spec: BackboneSpec) -> list[str]:
    """What differs from the published networks."""
    found = [f"{name} {value:g}" for name, (value, _) in spec.unpublished.items()]
    return [f"not as published: {', '.join(found)}"] if found else []


def _images(path: Path) -> list[str]:
    """How it wants its images, where that is stated."""
    stated = stated_inputs(path)
    mean, std = stated.mean or (), stated.std or ()
    return [f"images: mean {list(mean)}, std {list(std)} ({stated.source})"] if mean else []


def _files_of(path: Path) -> list[Path]:
    in_folder = sorted(path.glob("*.safetensors")) or sorted(path.glob(PICKLED))
    return in_folder if path.is_dir() else [path]
