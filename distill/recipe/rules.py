"""What a recipe's keys must be to each other: every rule that needs no device and no file.

Each rule reads the keys that validated and skips what it cannot know, so that one wrong key does not
hide what is wrong with its neighbours.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from distill.errors import RecipeError
from distill.listing.document import Loc, Problem
from distill.listing.extensions import ExtensionKind, require
from distill.recipe.crop_rules import crop_rules, finer_rules, is_multiple, scale_rules
from distill.recipe.family_stage_rules import family_stage_rules
from distill.recipe.init_keys import gram_rules
from distill.recipe.interval_keys import export_problems
from distill.recipe.keys import is_ours
from distill.recipe.networks import HEADS_MODES, RESERVED_NETWORKS, ArchSpec
from distill.recipe.types import BUILTIN_PHOTOGRAPHS, is_custom
from students.shapes import CATALOG
from teacher.shapes import ViTSpec

# The given or default value of every valid key, by its place; a wrong key is not there.
Parts = Mapping[Loc, Any]

FREE_SIZE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # needed, optional
    "vit": (
        ("width", "depth", "heads"),
        ("patch", "ffn", "ffn_width", "layerscale", "norm_eps", "key_bias", "untie_local_norm"),
    ),
    "convnext": (("depths", "widths"), ("layerscale", "norm_eps")),
}


def items_of(parts: Parts, *key_path: str | int) -> list[int]:
    """Numbers of the items of the list at ``key_path`` of which at least one key is valid."""
    depth = len(key_path)
    return sorted(
        {
            part
            for loc in parts
            if loc[:depth] == key_path
            for part in loc[depth : depth + 1]
            if isinstance(part, int)
        }
    )


def find_conflicts(parts: Parts, teacher: Parts | None = None) -> Iterator[Problem]:
    """What is wrong across keys; ``teacher`` is the recipe that a family trains first, if any."""
    yield from _range_rules(parts)
    yield from _batch_rules(parts)
    yield from _source_rules(parts)
    yield from _extension_rules(parts)
    yield from export_problems(parts)
    if items_of(parts, "students"):
        yield from _family_rules(parts, teacher or {})
    elif items_of(parts, "stages"):
        yield from _teacher_rules(parts)


def _range_rules(parts: Parts) -> Iterator[Problem]:
    """Pairs of numbers in order, deviations above zero."""
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
    for key_path in (("data",), *sources):
        std = parts.get((*key_path, "std"))
        if std is not None and min(std) <= 0.0:
            yield (*key_path, "std"), f"{list(std)}: each must be above 0"


def _batch_rules(parts: Parts) -> Iterator[Problem]:
    """Batches that all ranks, and KoLeo, have enough of."""
    batch, processes = parts.get(("schedule", "batch")), parts.get(("engine", "processes"))
    if isinstance(processes, int) and processes < 1:
        yield ("engine", "processes"), f"{processes}: at least 1, or auto"
    if isinstance(processes, int) and batch is not None and processes > batch:
        yield (
            ("schedule", "batch"),
            f"{batch} images for {processes} processes: at least one image each is needed",
        )
    for index in items_of(parts, "stages"):
        value = parts.get(("stages", index, "batch"))
        if isinstance(processes, int) and value is not None and processes > value:
            text = f"{value} images for {processes} processes: at least one image each is needed"
            yield ("stages", index, "batch"), text
    objectives = [
        (("objective",), None),
        *((("stages", i, "objective"), ("stages", i, "batch")) for i in items_of(parts, "stages")),
    ]
    lonely: set[Loc] = set()
    for objective, stage_batch in objectives:
        value = None if stage_batch is None else parts.get(stage_batch)
        if parts.get((*objective, "koleo")) and (value or batch) == 1:
            lonely.add(
                ("schedule", "batch") if value is None or stage_batch is None else stage_batch
            )
    yield from _koleo_rules(parts)
    for key_path in lonely:
        yield key_path, "1: koleo compares images, so it needs a batch of at least 2 (or koleo: 0)"


def _koleo_rules(parts: Parts) -> Iterator[Problem]:
    """Micro-batches of a fixed size, and those of ZeRO 3, are cut between groups of 16 images, so KoLeo's must lie within."""
    fixed = {
        "engine.zero: 3": parts.get(("engine", "zero")) == 3,
        "a number as engine.micro_batch": isinstance(parts.get(("engine", "micro_batch")), int),
    }
    students = [("students", index) for index in items_of(parts, "students")]
    for key_path in (("schedule",), *students):
        size = parts.get((*key_path, "koleo_group"))
        for cause in [cause for cause, is_so in fixed.items() if is_so and size and 16 % size]:
            yield (*key_path, "koleo_group"), f"{size}: with {cause} it must be 2, 4, 8 or 16"


def _source_rules(parts: Parts) -> Iterator[Problem]:
    """Shares of the sources, and their names."""
    weights = [
        parts.get(("data", "sources", i, "weight")) for i in items_of(parts, "data", "sources")
    ]
    for index in items_of(parts, "data", "sources"):
        weight, batches = (parts.get(("data", "sources", index, k)) for k in ("weight", "batches"))
        value = [parts.get(("data", "sources", index, key)) for key in ("mean", "std")]
        if weight is None and (batches == "pure" or any(weights) or any(value)):
            reason = "batches: pure needs one" if batches == "pure" else "other sources have one"
            reason = "a separate mean or std needs one" if any(value) else reason
            yield (
                ("data", "sources", index, "weight"),
                f"missing, and {reason}: its share of images",
            )
        path = parts.get(("data", "sources", index, "path"))
        if path is not None and path.startswith("builtin:") and path != BUILTIN_PHOTOGRAPHS:
            key_path = ("data", "sources", index, "path")
            yield key_path, f"{path!r}: the only built-in images are {BUILTIN_PHOTOGRAPHS!r}"


def _extension_rules(parts: Parts) -> Iterator[Problem]:
    """Every name of an installed package is known; nothing is imported to find out."""
    launcher = parts.get(("engine", "launcher"))
    named: list[tuple[ExtensionKind, Loc, str]] = [
        *(
            (ExtensionKind.LOSS, ("objective", "extra"), name)
            for name in parts.get(("objective", "extra")) or ()
        ),
        *(
            (ExtensionKind.SINK, ("engine", "metric_sinks"), name)
            for name in parts.get(("engine", "metric_sinks")) or ()
        ),
    ]
    if launcher not in (None, "auto"):
        named.append((ExtensionKind.LAUNCHER, ("engine", "launcher"), launcher))
    for index in items_of(parts, "data", "sources"):
        source: Loc = ("data", "sources", index)
        lister = parts.get((*source, "lister"))
        if lister is not None:
            named.append((ExtensionKind.SOURCE, (*source, "lister"), lister))
        if lister is not None and parts.get((*source, "path")) == BUILTIN_PHOTOGRAPHS:
            yield (*source, "lister"), f"{lister}: {BUILTIN_PHOTOGRAPHS} takes none"
    for kind, loc, name in named:
        try:
            require(kind, name, "")
        except RecipeError as error:
            yield loc, error.message.removeprefix(" = ")


def _family_rules(parts: Parts, teacher: Parts) -> Iterator[Problem]:
    scaled: set[str] = set()
    strides: dict[str, int] = {}
    sides: dict[str, tuple[int, float]] = {}  # stride, and scale of crops
    ends: dict[str, int | None] = {}
    num_steps = parts.get(("schedule", "steps"))
    teacher_stride = _stride(teacher, ("model",))
    teacher_scale = parts.get(("teacher", "crop_scale"), 1.0)
    for index in items_of(parts, "students"):
        key_path = ("students", index)
        yield from _arch_rules(parts, key_path)
        label = parts.get((*key_path, "name")) or parts.get((*key_path, "arch"))
        if label is None:
            continue
        if is_custom(label):
            yield (*key_path, "arch"), f"{label!r} comes from outside: give the student a 'name'"
        if label in scaled:
            yield key_path, f"two students are called {label!r}: give one a 'name'"
        if label in RESERVED_NETWORKS:
            yield (*key_path, "name"), f"{label!r} is taken by the teacher: choose another"
        scaled.add(label)
        stride = _stride(parts, key_path)
        scale = parts.get((*key_path, "crop_scale"), 1.0)
        if stride is not None and scale is not None:
            sides[label] = stride, scale
            if scale == 1.0:
                strides[label] = stride
            else:
                yield from scale_rules(parts, key_path, stride, scale)
            if teacher_stride is not None:
                sides_here = (stride, scale), (teacher_stride, teacher_scale)
                yield from finer_rules(key_path, *sides_here)
        ends[label] = parts.get((*key_path, "steps"))
        if ends[label] is not None and num_steps is not None and ends[label] > num_steps:
            yield (
                (*key_path, "steps"),
                f"{ends[label]}: the family ends at schedule.steps = {num_steps}",
            )
    yield from _length_rules(parts, ends)
    if teacher_stride is not None:
        sides["the teacher"] = teacher_stride, teacher_scale
        if teacher_scale != 1.0:
            yield from scale_rules(parts, ("teacher",), teacher_stride, teacher_scale)
    yield from family_stage_rules(parts, items_of(parts, "stages"), sides)
    strides_of_teacher: dict[str, int] = {}
    if teacher_stride is not None and teacher_scale == 1.0:
        strides_of_teacher = {"the teacher": teacher_stride}
    for key in ("global", "eval_size"):
        yield from crop_rules(parts, key, {**strides_of_teacher, **strides})
    yield from crop_rules(parts, "local", strides)
    yield from _source_of_teacher_rules(parts, teacher)


def _length_rules(parts: Parts, ends: Mapping[str, int | None]) -> Iterator[Problem]:
    """Which ranks, and how long; ``ends`` are the students' steps, None for all."""
    num_steps = parts.get(("schedule", "steps"))
    requested = {i: parts.get(("students", i, "ranks")) for i in items_of(parts, "students")}
    ranged = {i for i, ranks in requested.items() if isinstance(ranks, str) and ranks != "auto"}
    for index, ranks in requested.items():
        if ranged and index not in ranged and ranks is not None:
            text = f"{ranks}: other students say which ranks, so write FIRST-LAST here too"
            yield ("students", index, "ranks"), text
    if ends and num_steps is not None and all(end and end < num_steps for end in ends.values()):
        last = max(end for end in ends.values() if end)
        yield (
            ("schedule", "steps"),
            f"{num_steps}: no student trains so long - did you mean {last}?",
        )


def _source_of_teacher_rules(parts: Parts, teacher: Parts) -> Iterator[Problem]:
    """Where the teacher comes from, and the pixels that it expects."""
    train, weights, heads = (parts.get(("teacher", key)) for key in ("train", "weights", "heads"))
    is_given = {("teacher", "train"), ("teacher", "weights")} <= parts.keys()
    if is_given and (train is None) == (weights is None):
        yield ("teacher",), "give either 'train' (a teacher recipe) or 'weights' (a folder)"
    close = difflib.get_close_matches(str(heads).lower(), HEADS_MODES, n=1)
    if heads not in (None, *HEADS_MODES) and (train is not None or close):
        why = " goes with 'weights': a trained teacher has heads; 'fit' or 'none' replace them"
        yield ("teacher", "heads"), f"{heads!r}{f' - did you mean {close[0]!r}?' if close else why}"
    if {parts.get(("teacher", "licence", key), "") for key in ("name", "file", "link")} == {None}:
        yield ("teacher", "licence"), "names nothing: give a 'name', a 'file' or a 'link'"
    for key in ("mean", "std"):
        value, theirs = parts.get(("data", key)), teacher.get(("data", key))
        if value is not None and theirs is not None and list(value) != list(theirs):
            allowed = f"{list(theirs)}: use the same in both"
            yield ("data", key), f"{list(value)} is not the teacher recipe's {allowed}"


def _teacher_rules(parts: Parts) -> Iterator[Problem]:
    arch, stride = parts.get(("model", "arch")), _stride(parts, ("model",))
    yield from _arch_rules(parts, ("model",))
    if arch is not None and (arch.startswith("convnext") or is_custom(arch)):
        yield ("model", "arch"), f"{arch!r} has no mask token: a teacher must be a ViT"
    elif stride is not None:
        for key in ("global", "local", "eval_size"):
            yield from crop_rules(parts, key, {str(arch): stride})
        for index in items_of(parts, "stages"):
            yield from _stage_crop_rules(parts, index, str(arch), stride)
    before: dict[str, int | None] = {}
    is_complete = True
    has_init = parts.get(("model", "init")) is not None or ("model", "init", "from") in parts
    for index in items_of(parts, "stages"):
        name = parts.get(("stages", index, "name"))
        reference = parts.get(("stages", index, "gram", "teacher"))
        if reference is not None and is_complete:
            key_path: Loc = ("stages", index, "gram", "teacher")
            yield from gram_rules(key_path, reference, before, has_init=has_init)
        ramp, steps = (parts.get(("stages", index, key)) for key in ("ramp", "steps"))
        if ramp and steps and ramp > steps:
            yield ("stages", index, "ramp"), f"{ramp:,}: longer than the stage, {steps:,} steps"
        if name is None:
            is_complete = False
            continue
        if name in before or is_ours(name):
            yield (
                ("stages", index, "name"),
                f"{name!r} is taken: stages need different names, none 'heads' or 'family'",
            )
        before[name] = parts.get(("stages", index, "steps"))


def _stage_crop_rules(parts: Parts, index: int, arch: str, stride: int) -> Iterator[Problem]:
    """Crops of a stage, and what its anchor gets of them, are multiples of the patch."""
    key_path = ("stages", index)
    listed = items_of(parts, *key_path, "crops")
    sizes = [parts.get(("crops", "global", "size"))]
    if listed:
        sizes = [parts.get((*key_path, "crops", item, "global")) for item in listed]
    for item in listed:
        for key in ("global", "local"):
            size = parts.get((*key_path, "crops", item, key))
            if size is not None and size % stride:
                near = max(stride, round(size / stride) * stride)
                text = f"{size} is not a multiple of {stride} ({arch}) - did you mean {near}?"
                yield (*key_path, "crops", item, key), text
    times = parts.get((*key_path, "gram", "resolution"))
    for size in sizes:
        if times is None or size is None or size % stride:
            continue
        scaled = size * times
        if not is_multiple(scaled, stride):
            text = f"{times:g} times {size} px is {scaled:g} px, not a multiple of the patch of {stride}"
            yield (*key_path, "gram", "resolution"), text


def _arch_rules(parts: Parts, key_path: Loc) -> Iterator[Problem]:
    """A free size needs its numbers; a catalogue name has them already."""
    arch = parts.get((*key_path, "arch"))
    if arch is None:
        return
    needed, optional = FREE_SIZE_KEYS.get(arch, ((), ()))
    known = CATALOG.get(arch)
    if isinstance(known, ViTSpec):
        optional = ("patch", "norm_eps", "key_bias", "untie_local_norm")
        if parts.get((*key_path, "key_bias")) and not known.qv_bias:
            yield (*key_path, "key_bias"), f"true: queries and values of {arch} have no bias either"
    elif known is not None:
        optional = ("norm_eps",)
    if is_custom(arch):
        optional = ("args",)
    absent = [key for key in needed if (*key_path, key) in parts and parts[*key_path, key] is None]
    if absent:
        yield (
            (*key_path, "arch"),
            f"arch {arch!r} is a free size: it needs {', '.join(map(repr, absent))}",
        )
    for key in ArchSpec.model_fields:
        if (
            key not in ("arch", "init", *needed, *optional)
            and parts.get((*key_path, key)) is not None
        ):
            yield (*key_path, key), f"{key!r} does not apply to arch {arch!r}"
    width, heads = parts.get((*key_path, "width")), parts.get((*key_path, "heads"))
    if arch == "vit" and width and heads and (width % heads or width // heads % 4):
        yield (
            (*key_path, "heads"),
            f"width {width} over {heads} heads: each needs a multiple of 4",
        )
    depths, widths = parts.get((*key_path, "depths")), parts.get((*key_path, "widths"))
    if arch == "convnext" and depths and widths and len(depths) != len(widths):
        yield (
            (*key_path, "widths"),
            f"{len(widths)} widths for {len(depths)} depths: give one of each per stage",
        )
    if arch == "convnext" and depths is not None and len(depths) < 2:
        yield (*key_path, "depths"), f"{list(depths)}: a ConvNeXt needs two stages at least"


def _stride(parts: Parts, key_path: Loc) -> int | None:
    """Pixels per side of a patch of the network at ``key_path``; None while that is not known."""
    keys = ("arch", "patch", "depths")
    if any((*key_path, key) not in parts for key in keys) or is_custom(parts[*key_path, "arch"]):
        return None
    spec = ArchSpec.model_construct(**{key: parts[*key_path, key] for key in keys})
    return None if spec.arch == "convnext" and not spec.depths else spec.stride
