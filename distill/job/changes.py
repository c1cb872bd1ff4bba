"""What a run is refused for: keys, and images, that are not those of its checkpoints, with both values."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.data.index import ImageIndex
from distill.errors import UserError
from distill.job.stored_recipes import Recipes, read_recipes
from distill.recipe.keys import FamilyRecipe
from distill.recipe.types import Section, facts_of
from distill.runfolder.manifest import ChangedError

SHOWN = 3  # names of images that a line gives
MOST_NAMES = 5_000_000  # beyond, only numbers of images are compared

Entry = tuple[int, bytes]  # source, name within it


def with_changes(
    error: ChangedError,
    run_folder: Path,
    recipes: Recipes,
    indices: Mapping[str, ImageIndex | None],
) -> ChangedError:
    """Returns the error with a line for each science key and each set of images that changed since the run was prepared.

    Args:
        error: the refusal.
        run_folder: holds the recipes and the indices of before.
        recipes: as they are now.
        indices: of now, by their name in the run folder.
    """
    lines: list[str] = []
    with suppress(UserError, OSError):  # not there, or not readable by this version
        for old, new, prefix in zip(
            read_recipes(run_folder), recipes, ("", "teacher:"), strict=True
        ):
            lines += [f"  {prefix}{each}" for each in changed_keys(old, new)]
    parts = {"images": ("train", "held_out"), "images of the teacher's recipe": ("teacher",)}
    for what, names in parts.items():
        with suppress(UserError):
            folders = [run_folder / "data" / name for name in names]
            before = [ImageIndex.load(each) for each in folders if (each / "index.json").is_file()]
            now = [index for name in names if (index := indices.get(name)) is not None]
            if before and now:
                lines += [f"  {what}: {each}" for each in changed_images(before, now)]
    return ChangedError("\n".join([error.message, *lines]), fix=error.fix)


def changed_keys(old: Section | None, new: Section | None) -> list[str]:
    """Returns ``KEY: new, was old`` for each science key whose value differs, students by their name."""
    if old is None or new is None:
        return [] if old is new else ["recipe: there is one now" if new else "recipe: gone"]
    before, now = dict(_values(old)), dict(_values(new))
    return [
        f"{key}: {_shown(now, key)}, was {_shown(before, key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    """A value as a recipe has it."""
    value = values.get(key, "not there")
    return value if isinstance(value, str) else json.dumps(value)


def _values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every science key; what heads a family learns from counts as one."""
    for name, field in type(section).model_fields.items():
        if facts_of(field).role == "science":
            yield from _values_of(getattr(section, name), f"{prefix}{field.alias or name}")
    if isinstance(section, FamilyRecipe):
        yield "teacher.heads", section.teacher.heads_mode


def _values_of(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        yield from _values(value, f"{key}.")
    elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        for position, item in enumerate(value):
            label = getattr(item, "label", position) if key == "students" else position
            yield from _values_of(item, f"{key}.{label}")
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def changed_images(old: Sequence[ImageIndex], new: Sequence[ImageIndex]) -> list[str]:
    """Returns how many images were added, removed, have another size or another class, with a few names."""
    counts = [sum(map(len, indices)) for indices in (old, new)]
    if max(counts) > MOST_NAMES:
        return [f"{counts[1]:,}, were {counts[0]:,}"] if counts[0] != counts[1] else []
    before, now = ({k: v for index in each for k, v in _entries(index)} for each in (old, new))
    both = before.keys() & now.keys()
    kinds = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "of another size": {each for each in both if before[each][0] != now[each][0]},
        "in another class": {each for each in both if before[each][1] != now[each][1]},
    }
    lines = []
    for kind, entries in kinds.items():
        if entries:
            names = [name.decode(errors="replace") for _, name in sorted(entries)[:SHOWN]]
            more = ", ..." if len(entries) > SHOWN else ""
            lines.append(f"{len(entries):,} {kind} ({', '.join(names)}{more})")
    return lines if lines or [*before] == [*now] else ["in another order"]


def _entries(index: ImageIndex) -> Iterator[tuple[Entry, tuple[list[int], str]]]:
    """Source and name of every image, then its height and width, and its class."""
    names, ends = index.names.tobytes(), [0, *index.name_ends.tolist()]
    labels = [""] * len(index)
    if index.labels is not None:
        labels = [index.class_names[label] for label in index.labels.tolist()]
    for source, images in enumerate(index.bounds):
        for image in images:
            name = names[ends[image] : ends[image + 1]]
            yield (source, name), (index.hw[image].tolist(), labels[image])
