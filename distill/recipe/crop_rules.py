"""What the sizes of crops must be to the patches of the networks that get them, at each network's scale."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from distill.listing.document import Loc, Problem

Parts = Mapping[Loc, Any]
CLOSE = 1e-6  # a side that comes of a factor is an integer of pixels


def is_multiple(pixels: float, stride: int) -> bool:
    """A side that comes of a factor is a multiple of the patch."""
    return (
        round(pixels) > 0 and abs(pixels - round(pixels)) <= CLOSE and round(pixels) % stride == 0
    )


def scale_rules(parts: Parts, key_path: Loc, stride: int, scale: float) -> Iterator[Problem]:
    """Every crop that a network gets must be a multiple of its patch at its scale; a teacher gets local ones only to fit heads."""
    has_locals = parts.get(("crops", "local", "count")) != 0
    if key_path == ("teacher",) and parts.get(("teacher", "heads")) != "fit":
        has_locals = False
    for key in (("global", "size"), ("local", "size"), ("eval_size",)):
        size = parts.get(("crops", *key))
        if size is None or (key[0] == "local" and not has_locals):
            continue
        scaled = size * scale
        if not is_multiple(scaled, stride):
            name = ".".join(("crops", *key))
            text = f"{scale} of {name} = {size} is {scaled:g} px, not a multiple of the patch of {stride}"
            yield (*key_path, "crop_scale"), text


def finer_rules(
    key_path: Loc, side: tuple[int, float], teacher_side: tuple[int, float]
) -> Iterator[Problem]:
    """A student's patches must not be finer than the teacher's; of each the stride and the scale of its crops."""
    (stride, scale), (teacher_stride, teacher_scale) = side, teacher_side
    coarsest = teacher_stride * scale / teacher_scale
    if stride >= coarsest - CLOSE:
        return
    if scale == teacher_scale == 1.0:
        text = f"patches of {stride} px are finer than the teacher's {teacher_stride} px: use {teacher_stride} or a multiple of it"
    else:
        text = (
            f"patches of {stride} px at crop_scale {scale:g} are finer than the teacher's {teacher_stride} px at "
            f"{teacher_scale:g}: use {math.ceil(coarsest)} px or more, or another crop_scale"
        )
    yield (*key_path, "patch"), text


def crop_rules(parts: Parts, key: str, strides: Mapping[str, int]) -> Iterator[Problem]:
    """A crop must be a multiple of the patch of every network that gets it."""
    key_path = ("crops", key) if key == "eval_size" else ("crops", key, "size")
    size = parts.get(key_path)
    if size is None or (key == "local" and parts.get(("crops", "local", "count")) == 0):
        return
    wrong: dict[int, list[str]] = {}
    for label, stride in strides.items():
        if size % stride:
            wrong.setdefault(stride, []).append(label)
    if wrong:
        unit = math.lcm(*strides.values())
        near = max(unit, round(size / unit) * unit)
        patches = " and ".join(
            f"{stride} ({', '.join(labels)})" for stride, labels in wrong.items()
        )
        yield (
            key_path,
            f"{size} is not a multiple of {patches} - did you mean {near}?",
        )
