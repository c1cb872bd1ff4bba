"""YAML to recipe, with every problem at once, each at its line and column.

Two passes over a file: pydantic checks each key, then the rules across keys run on every key that is
valid by itself, so that a recipe is repaired in one round instead of two.
"""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.errors import RecipeError
from distill.listing.document import (
    KEY,
    OVERRIDE,
    RESOLVED,
    RESOLVED_TEACHER,
    Document,
    Loc,
    Problem,
    find_recipe,
    read_document,
    with_overrides,
)
from distill.listing.problem_text import refuse, render
from distill.recipe.extension_keys import find_section, unread_section, with_sections
from distill.recipe.formats import format_of, with_defaults_of
from distill.recipe.keys import FamilyRecipe, Recipe, TeacherRecipe
from distill.recipe.messages import explain, place_of, resembled
from distill.recipe.networks import HEADS_MODES
from distill.recipe.rules import Parts, find_conflicts, items_of
from distill.recipe.types import BUILTIN_PHOTOGRAPHS, Section, fields_of, section_in

TEACHER_PREFIX = "teacher:"
Kind = type[FamilyRecipe] | type[TeacherRecipe]


@dataclass(frozen=True)
class Reading:
    """A recipe after the first pass; ``recipe`` is None if a key is wrong."""

    document: Document
    kind: Kind
    recipe: Recipe | None
    parts: Parts
    problems: tuple[Problem, ...]


def load_job(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    check_folders: bool = False,
    loads_sections: bool = True,
) -> tuple[Recipe, TeacherRecipe | None]:
    """A recipe and, if it is a family that trains its teacher first, the teacher's recipe.

    Overrides are ``KEY=VALUE`` for the recipe and ``teacher:KEY=VALUE`` for the teacher's.
    ``check_folders`` looks whether the folders that the recipes name are there, too. Without
    ``loads_sections`` no package is imported, and its keys under ``extensions`` are taken as they are.

    Raises:
        RecipeError: every problem of both files.
    """
    family_overrides = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    theirs = [text for text in overrides if text.startswith(TEACHER_PREFIX)]
    path = find_recipe(recipe)
    first = _read_fields(path, family_overrides, loads_sections=loads_sections)
    problems = list(first.problems)
    second: Reading | None = None
    train = first.parts.get(("teacher", "train"))
    if train is None:
        problems += [((OVERRIDE, text), "this recipe trains no teacher") for text in theirs]
    elif not (named := teacher_recipe_of(path, train)).is_file():
        beside = difflib.get_close_matches(train, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" - did you mean {beside[0]!r}?" if beside else ""
        text = f"{named} does not exist; give its path relative to this recipe{hint}"
        problems.append((("teacher", "train"), text))
    else:
        second = _read_fields(
            named,
            [text.removeprefix(TEACHER_PREFIX) for text in theirs],
            loads_sections=loads_sections,
        )
        if not issubclass(second.kind, TeacherRecipe):
            problems.append(
                (("teacher", "train"), f"{train!r} has no stages, so trains no teacher")
            )
            second = None
    problems += find_conflicts(first.parts, None if second is None else second.parts)
    problems += _missing_folders(first.parts, problems) if check_folders else []
    texts = render(first.document, problems)
    if second is not None:
        problems = [*second.problems, *find_conflicts(second.parts)]
        problems += _missing_folders(second.parts, problems) if check_folders else []
        texts += render(second.document, problems)
    refuse(texts)
    assert first.recipe is not None, "no problem was found"
    if second is None:
        return first.recipe, None
    assert isinstance(second.recipe, TeacherRecipe), "no problem was found"
    return first.recipe, second.recipe


def teacher_recipe_of(path: Path, train: str) -> Path:
    """The file of the teacher's recipe that the recipe at ``path`` names; in a run folder it lies beside it."""
    if path.name != RESOLVED:
        return path.parent / train
    stored = (path.with_name(RESOLVED_TEACHER), path.with_name(Path(train).name))  # 0.1.0: the last
    return next((each for each in stored if each.is_file()), path.parent / train)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in one file; a teacher's recipe that it names is not read.

    Raises:
        RecipeError: every problem at once, with line, column and a suggestion.
    """
    reading = _read_fields(path, overrides)
    refuse(render(reading.document, [*reading.problems, *find_conflicts(reading.parts)]))
    assert reading.recipe is not None, "no problem was found"
    return reading.recipe


def names_teacher_recipe(recipe: str, overrides: Sequence[str] = ()) -> bool:
    """Whether the recipe, right or wrong in other places, trains its teacher by another recipe."""
    family_overrides = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    return (
        _read_fields(find_recipe(recipe), family_overrides, loads_sections=False).parts.get(
            ("teacher", "train")
        )
        is not None
    )


def _read_fields(path: Path, overrides: Sequence[str], *, loads_sections: bool = True) -> Reading:
    document, problems = with_overrides(read_document(path), overrides)
    named = document.values.get("extensions")
    kind, wrong = _with_extensions(
        _kind(document), named, find_section if loads_sections else unread_section
    )
    problems += [(("extensions", name), text) for name, text in wrong.items()]
    values = with_defaults_of(format_of(document.values), kind, document.values)
    if wrong:
        given = values["extensions"].items()
        values["extensions"] = {name: part for name, part in given if name not in wrong}
    recipe: Recipe | None = None
    errors: list[Any] = []
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    by_place: dict[Loc, list[Any]] = {}
    for entry in errors:
        by_place.setdefault(place_of(kind, entry), []).append(entry)
    unread = _unread(kind, by_place, values)
    for loc in [loc for loc in by_place if loc in unread or _is_echo(loc, by_place)]:
        del by_place[loc]
    problems += [(loc, explain(kind, loc, entries, document)) for loc, entries in by_place.items()]
    parts = dict(_valid_parts(kind, values, (), {*by_place, *unread}))
    if path.name not in {RESOLVED, RESOLVED_TEACHER}:  # a prepared job goes on
        problems += _unused_ends(document, parts)
    return Reading(document, kind, None if problems else recipe, parts, tuple(problems))


def _unused_ends(document: Document, parts: Parts) -> Iterator[Problem]:
    """Given keys of a decay where the rate stays at its peak."""
    for loc in [loc for loc, value in parts.items() if loc[-1] == "decay" and value == "constant"]:
        given: Any = document.values
        for part in loc[:-1]:
            given = given[part]
        for key in sorted({"end", "decay_steps"} & given.keys()):
            here = (*loc[:-1], key)
            line = document.lines[document.marks[here][0]] if here in document.marks else ""
            is_default = line.endswith("# default") and here not in document.overridden
            if parts.get(here) is not None and not is_default:
                text = f"{parts[here]:g}: not used, since decay is constant - add decay: cosine, or leave {key} out"
                yield here, text


def _unread(kind: Kind, by_place: Mapping[Loc, Any], values: Mapping[Any, Any]) -> set[Loc]:
    """Keys that are not given and that an unknown one beside them was probably meant to be: nothing is known of them."""
    found = set[Loc]()
    for loc in by_place:
        meant = resembled(kind, loc[:-1]) if loc[-1] == KEY else None
        holder: Any = values
        for part in meant[:-1] if meant else ():
            holder = holder[part]
        if meant and meant[-1] not in holder:
            found.add(meant)
    return found


def _is_echo(loc: Loc, by_place: Mapping[Loc, Sequence[Any]]) -> bool:
    """A list is short only because items of it are wrong, and those are reported."""
    is_short = all(entry["type"] == "too_short" for entry in by_place[loc])
    return is_short and any(each != loc and each[: len(loc)] == loc for each in by_place)


def _kind(document: Document) -> Kind:
    kinds: dict[str, Kind] = {"students": FamilyRecipe, "stages": TeacherRecipe}
    found = [key for key in kinds if key in document.values][:1]  # a family has stages too
    if not found:  # a misspelt one is known by what it is close to, and reported as unknown
        found = [k for k in kinds if difflib.get_close_matches(k, map(str, document.values), n=1)]
    if len(found) != 1:
        given = next((key for key in found if (key,) in document.overridden), None)
        raise RecipeError(
            f"{f'override {given!r}' if given else f'{document.label}:1:1'}: needs either 'students' (a family) "
            "or 'stages' (a teacher), has neither",
            fix="Start from `distill recipes copy quickstart my.yaml`.",
        )
    return kinds[found[0]]


def _with_extensions(
    kind: Kind, named: Any, find_section: Callable[[str], type[Section]]
) -> tuple[Kind, dict[str, str]]:
    """The kind with the sections of the installed packages that a recipe names, and what is wrong with names."""
    sections, wrong = dict[str, type[Section]](), dict[str, str]()
    for name in named if isinstance(named, dict) else ():
        try:
            sections[name] = find_section(str(name))
        except RecipeError as error:
            wrong[name] = error.message.removeprefix(f"extensions = {name}: ")
    return (with_sections(kind, sections) if sections else kind), wrong


def _valid_parts(
    kind: type[Section], given: Mapping[Any, Any], loc: Loc, wrong: Collection[Loc]
) -> Iterator[tuple[Loc, Any]]:
    """Place and value, given or default, of every key below ``loc`` that pydantic found valid."""
    for key, field in fields_of(kind).items():
        here = (*loc, key)
        if here in wrong or (key not in given and field.is_required()):
            continue
        value = given.get(key, field.default)
        section = section_in(field.annotation)
        if isinstance(value, Section):
            value = value.model_dump(by_alias=True)
        if section is not None and isinstance(value, dict):
            yield from _valid_parts(section, value, here, wrong)
        elif section is not None and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _valid_parts(section, item, (*here, index), wrong)
        elif not any(key_path[: len(here)] == here for key_path in wrong):
            yield here, value


def _missing_folders(parts: Parts, found: Sequence[Problem]) -> Iterator[Problem]:
    """Named folders that are not there, and image folders without an image."""
    from distill.listing.sources import find_problem

    for index in items_of(parts, "data", "sources"):
        source: Loc = ("data", "sources", index)
        path = parts.get((*source, "path"))
        if path is None or path == BUILTIN_PHOTOGRAPHS:
            continue
        has_lister = parts.get((*source, "lister")) is not None
        if problem := find_problem(path, has_lister=has_lister):
            if not path.isprintable():  # "D:\new": a line break
                problem = f"{path!r} is not there or no source of images - give it in single quotes: in double quotes a backslash has a meaning"
            yield (*source, "path"), problem
    weights = parts.get(("teacher", "weights"))
    if weights is not None and not Path(weights).exists():
        yield ("teacher", "weights"), f"{weights!r} is not there: a folder or file of weights"
    heads = parts.get(("teacher", "heads"))
    is_wrong = any(loc == ("teacher", "heads") for loc, _ in found)
    if not is_wrong and heads not in (None, *HEADS_MODES) and not Path(str(heads)).is_file():
        yield ("teacher", "heads"), f"{heads!r} is no file of heads: give one, or 'fit' or 'none'"
    licence = parts.get(("teacher", "licence", "file"))
    if licence is not None and not Path(licence).expanduser().is_file():
        yield ("teacher", "licence", "file"), f"{licence!r} is not there: a file with its text"
