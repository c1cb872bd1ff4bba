"""What a recipe's keys must be to each other: every rule that needs no device and no file.

Each rule reads the keys that validated and skips what it cannot know, so that one wrong key does not
hide what is wrong with its neighbours.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from distill.recipe.keys import RESERVED_PHASES
from distill.recipe.networks import HEADS_MODES, RESERVED_NETWORKS, ArchSpec
from distill.recipe.types import BUILTIN_PHOTOGRAPHS, Loc, Problem, is_custom
from students.shapes import CATALOG
from teacher.shapes import ViTSpec

# The given or default value of every valid key, by its place; a wrong key is not there.
Parts = Mapping[Loc, Any]

FREE_SIZE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # needed, optional
    "vit": (
        ("width", "depth", "heads"),
        ("patch", "ffn", "ffn_width", "layerscale", "untie_local_norm"),
    ),
    "convnext": (("depths", "widths"), ("layerscale",)),
}


def items_of(parts: Parts, *place: str | int) -> list[int]:
    """Numbers of the items of the list at ``place`` of which at least one key is valid."""
    depth = len(place)
    return sorted(
        {
            part
            for loc in parts
            if loc[:depth] == place
            for part in loc[depth : depth + 1]
            if isinstance(part, int)
        }
    )


def find_conflicts(parts: Parts, teacher: Parts | None = None) -> Iterator[Problem]:
    """What is wrong across keys; ``teacher`` is the recipe that a family trains first, if any."""
    yield from _shared_rules(parts)
    if items_of(parts, "students"):
        yield from _family_rules(parts, teacher or {})
    if items_of(parts, "stages"):
        yield from _teacher_rules(parts)


def _shared_rules(parts: Parts) -> Iterator[Problem]:
    blur = parts.get(("crops", "blur_sigma"))
    if blur is not None and not 0.0 < blur[0] <= blur[1]:
        yield ("crops", "blur_sigma"), f"{list(map(float, blur))}: must satisfy 0 < low <= high"
    for key in ("global", "local"):
        scale = parts.get(("crops", key, "scale"))
        if scale is not None and not 0.0 < scale[0] <= scale[1] <= 1.0:
            yield (
                ("crops", key, "scale"),
                f"{list(map(float, scale))}: must satisfy 0 < low <= high <= 1",
            )
    ratio = parts.get(("masks", "ratio"))
    if ratio is not None and not 0.0 <= ratio[0] <= ratio[1] <= 1.0:
        yield ("masks", "ratio"), f"{list(map(float, ratio))}: must satisfy 0 <= low <= high <= 1"
    bounds = parts.get(("schedule", "rope_rescale"))
    if bounds is not None and not 0.0 < bounds[0] <= bounds[1]:
        yield (
            ("schedule", "rope_rescale"),
            f"{list(map(float, bounds))}: must satisfy 0 < low <= high",
        )
    sources = [("data", "sources", index) for index in items_of(parts, "data", "sources")]
    for place in (("data",), *sources):
        std = parts.get((*place, "std"))
        if std is not None and min(std) <= 0.0:
            yield (*place, "std"), f"{list(std)}: each must be above 0"
    batch, processes = parts.get(("schedule", "batch")), parts.get(("engine", "processes"))
    if isinstance(processes, int) and processes < 1:
        yield ("engine", "processes"), f"{processes}: at least 1, or auto"
    if isinstance(processes, int) and batch is not None and processes > batch:
        yield (
            ("schedule", "batch"),
            f"{batch} images for {processes} processes: at least one image each is needed",
        )
    for index in items_of(parts, "stages"):
        own = parts.get(("stages", index, "batch"))
        if isinstance(processes, int) and own is not None and processes > own:
            told = f"{own} images for {processes} processes: at least one image each is needed"
            yield ("stages", index, "batch"), told
    objectives = [
        (("objective",), None),
        *((("stages", i, "objective"), ("stages", i, "batch")) for i in items_of(parts, "stages")),
    ]
    lonely: set[Loc] = set()
    for objective, own_batch in objectives:
        own = None if own_batch is None else parts.get(own_batch)
        if parts.get((*objective, "koleo")) and (own or batch) == 1:
            lonely.add(("schedule", "batch") if own is None or own_batch is None else own_batch)
    for place in lonely:
        yield place, "1: koleo compares images, so it needs a batch of at least 2 (or koleo: 0)"
    weights = [
        parts.get(("data", "sources", i, "weight")) for i in items_of(parts, "data", "sources")
    ]
    for index in items_of(parts, "data", "sources"):
        weight, batches = (parts.get(("data", "sources", index, k)) for k in ("weight", "batches"))
        own = [parts.get(("data", "sources", index, key)) for key in ("mean", "std")]
        if weight is None and (batches == "pure" or any(weights) or any(own)):
            need = "batches: pure needs one" if batches == "pure" else "other sources have one"
            need = "its own mean or std needs one" if any(own) else need
            yield ("data", "sources", index, "weight"), f"missing, and {need}: its share of images"
        path = parts.get(("data", "sources", index, "path"))
        if path is not None and path.startswith("builtin:") and path != BUILTIN_PHOTOGRAPHS:
            place = ("data", "sources", index, "path")
            yield place, f"{path!r}: the only built-in images are {BUILTIN_PHOTOGRAPHS!r}"


def _family_rules(parts: Parts, teacher: Parts) -> Iterator[Problem]:
    seen: set[str] = set()
    strides: dict[str, int] = {}
    ends: dict[str, int | None] = {}
    num_steps = parts.get(("schedule", "steps"))
    teacher_stride = _stride(teacher, ("model",))
    for index in items_of(parts, "students"):
        place = ("students", index)
        yield from _arch_rules(parts, place)
        label = parts.get((*place, "name")) or parts.get((*place, "arch"))
        if label is None:
            continue
        if is_custom(label):
            yield (*place, "arch"), f"{label!r} comes from outside: give the student a 'name'"
        if label in seen:
            yield place, f"two students are called {label!r}: give one a 'name'"
        if label in RESERVED_NETWORKS:
            yield (*place, "name"), f"{label!r} is taken by the teacher: choose another"
        seen.add(label)
        stride = _stride(parts, place)
        scale = parts.get((*place, "crop_scale"), 1.0)
        if stride is not None and scale is not None:
            if scale == 1.0:
                strides[label] = stride
            else:
                yield from _scale_rules(parts, place, stride, scale)
            if teacher_stride is not None and stride < teacher_stride * scale:
                finer = f"patches of {stride} px are finer than the teacher's {teacher_stride} px"
                yield (*place, "patch"), f"{finer}: use {teacher_stride} or a multiple of it"
        ends[label] = parts.get((*place, "steps"))
        if ends[label] is not None and num_steps is not None and ends[label] > num_steps:
            yield (
                (*place, "steps"),
                f"{ends[label]}: the family ends at schedule.steps = {num_steps}",
            )
    asked = {i: parts.get(("students", i, "ranks")) for i in items_of(parts, "students")}
    ranged = {i for i, ranks in asked.items() if isinstance(ranks, str) and ranks != "auto"}
    for index, ranks in asked.items():
        if ranged and index not in ranged and ranks is not None:
            told = f"{ranks}: other students say which ranks, so write FIRST-LAST here too"
            yield ("students", index, "ranks"), told
    if ends and num_steps is not None and all(end and end < num_steps for end in ends.values()):
        last = max(end for end in ends.values() if end)
        yield (
            ("schedule", "steps"),
            f"{num_steps}: no student trains so long - did you mean {last}?",
        )
    seen_by_teacher = {} if teacher_stride is None else {"the teacher": teacher_stride}
    for key in ("global", "eval_size"):
        yield from _crop_rules(parts, key, {**seen_by_teacher, **strides})
    yield from _crop_rules(parts, "local", strides)
    train, weights, heads = (parts.get(("teacher", key)) for key in ("train", "weights", "heads"))
    if {("teacher", "train"), ("teacher", "weights")} <= parts.keys() and (train is None) == (
        weights is None
    ):
        yield ("teacher",), "give either 'train' (a teacher recipe) or 'weights' (a folder)"
    if heads not in (None, *HEADS_MODES) and train is not None:
        allowed = "a trained teacher brings its own; 'fit' or 'none' replace them"
        yield ("teacher", "heads"), f"{heads!r} goes with 'weights': {allowed}"
    for key in ("mean", "std"):
        own, theirs = parts.get(("data", key)), teacher.get(("data", key))
        if own is not None and theirs is not None and list(own) != list(theirs):
            yield (
                ("data", key),
                f"{list(own)} is not the teacher recipe's {list(theirs)}: use the same in both",
            )


def _is_whole(pixels: float, stride: int) -> bool:
    """A side that comes of a factor is whole pixels and whole patches."""
    return abs(pixels - round(pixels)) <= 1e-6 and round(pixels) % stride == 0


def _scale_rules(parts: Parts, place: Loc, stride: int, scale: float) -> Iterator[Problem]:
    """Every crop at a student's scale must be whole patches of it."""
    for key in (("global", "size"), ("local", "size"), ("eval_size",)):
        size = parts.get(("crops", *key))
        if size is None or (key[0] == "local" and parts.get(("crops", "local", "count")) == 0):
            continue
        seen = size * scale
        if not _is_whole(seen, stride):
            name = ".".join(("crops", *key))
            told = f"{scale} of {name} = {size} is {seen:g} px, not a multiple of the patch of {stride}"
            yield (*place, "crop_scale"), told


def _teacher_rules(parts: Parts) -> Iterator[Problem]:
    arch, stride = parts.get(("model", "arch")), _stride(parts, ("model",))
    yield from _arch_rules(parts, ("model",))
    if arch is not None and (arch.startswith("convnext") or is_custom(arch)):
        yield ("model", "arch"), f"{arch!r} has no mask token: a teacher must be a ViT"
    elif stride is not None:
        for key in ("global", "local", "eval_size"):
            yield from _crop_rules(parts, key, {str(arch): stride})
        for index in items_of(parts, "stages"):
            yield from _stage_crop_rules(parts, index, str(arch), stride)
    before: dict[str, int | None] = {}
    is_complete = True
    for index in items_of(parts, "stages"):
        name = parts.get(("stages", index, "name"))
        moment = parts.get(("stages", index, "gram", "teacher"))
        if moment is not None and is_complete:
            yield from _gram_rules(("stages", index, "gram", "teacher"), moment, before)
        if name is None:
            is_complete = False
            continue
        if name in before or name in RESERVED_PHASES:
            yield (
                ("stages", index, "name"),
                f"{name!r} is taken: stages need different names, none 'heads' or 'family'",
            )
        before[name] = parts.get(("stages", index, "steps"))


def _stage_crop_rules(parts: Parts, index: int, arch: str, stride: int) -> Iterator[Problem]:
    """Crops of a stage, and what its anchor sees of them, are whole patches."""
    place = ("stages", index)
    listed = items_of(parts, *place, "crops")
    sizes = [parts.get(("crops", "global", "size"))]
    if listed:
        sizes = [parts.get((*place, "crops", item, "global")) for item in listed]
    for item in listed:
        for key in ("global", "local"):
            size = parts.get((*place, "crops", item, key))
            if size is not None and size % stride:
                near = max(stride, round(size / stride) * stride)
                told = f"{size} is not a multiple of {stride} ({arch}) - did you mean {near}?"
                yield (*place, "crops", item, key), told
    times = parts.get((*place, "gram", "resolution"))
    for size in sizes:
        if times is None or size is None or size % stride:
            continue
        seen = size * times
        if not _is_whole(seen, stride):
            told = (
                f"{times:g} times {size} px is {seen:g} px, not a multiple of the patch of {stride}"
            )
            yield (*place, "gram", "resolution"), told


def _arch_rules(parts: Parts, place: Loc) -> Iterator[Problem]:
    """A free size needs its numbers; a catalogue name has them already."""
    arch = parts.get((*place, "arch"))
    if arch is None:
        return
    needed, optional = FREE_SIZE_KEYS.get(arch, ((), ()))
    if isinstance(CATALOG.get(arch), ViTSpec):
        optional = ("patch", "untie_local_norm")
    if is_custom(arch):
        optional = ("args",)
    absent = [key for key in needed if (*place, key) in parts and parts[*place, key] is None]
    if absent:
        yield (
            (*place, "arch"),
            f"arch {arch!r} is a free size: it needs {', '.join(map(repr, absent))}",
        )
    for key in ArchSpec.model_fields:
        if key not in ("arch", *needed, *optional) and parts.get((*place, key)) is not None:
            yield (*place, key), f"{key!r} does not apply to arch {arch!r}"
    width, heads = parts.get((*place, "width")), parts.get((*place, "heads"))
    if arch == "vit" and width and heads and (width % heads or width // heads % 4):
        yield (
            (*place, "heads"),
            f"width {width} over {heads} heads: each needs a whole multiple of 4",
        )
    depths, widths = parts.get((*place, "depths")), parts.get((*place, "widths"))
    if arch == "convnext" and depths and widths and len(depths) != len(widths):
        yield (
            (*place, "widths"),
            f"{len(widths)} widths for {len(depths)} depths: give one of each per stage",
        )
    if arch == "convnext" and depths is not None and len(depths) < 2:
        yield (*place, "depths"), f"{list(depths)}: a ConvNeXt needs two stages at least"


def _stride(parts: Parts, place: Loc) -> int | None:
    """Pixels per side of a patch of the network at ``place``; None while that is not known."""
    keys = ("arch", "patch", "depths")
    if any((*place, key) not in parts for key in keys) or is_custom(parts[*place, "arch"]):
        return None
    spec = ArchSpec.model_construct(**{key: parts[*place, key] for key in keys})
    return None if spec.arch == "convnext" and not spec.depths else spec.stride


def _crop_rules(parts: Parts, key: str, strides: Mapping[str, int]) -> Iterator[Problem]:
    """A crop must be whole patches of every network that sees it."""
    place = ("crops", key) if key == "eval_size" else ("crops", key, "size")
    size = parts.get(place)
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
            place,
            f"{size} is not a multiple of {patches} - did you mean {near}?",
        )


def _gram_rules(place: Loc, moment: str, before: Mapping[str, int | None]) -> Iterator[Problem]:
    match = re.fullmatch(r"([^@]+)@([0-9]+)", moment)
    if match is None:
        yield place, f"{moment!r}: write an earlier stage and a step of it, such as 'base@200'"
        return
    name, step = match[1], int(match[2])
    if name not in before:
        earlier = ", ".join(before) or "none"
        yield place, f"{moment!r}: {name!r} is not an earlier stage (earlier: {earlier})"
        return
    num_steps = before[name]
    if num_steps is not None and not 1 <= step <= num_steps:
        yield place, f"{moment!r}: stage {name!r} has steps 1 to {num_steps}"
