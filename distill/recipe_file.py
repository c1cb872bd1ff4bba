"""YAML to recipe, with every problem at once, each at its line and column.

YAML 1.2 by ruamel: ``2e-4`` is a number, ``off`` is text, and a repeated key is an error instead of
a silent last-one-wins. Fields are checked part by part, so that rules across keys still run on
everything that is valid on its own.
"""

import difflib
import io
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distill.errors import RecipeError
from distill.recipe import RULES, FamilyRecipe, Loc, Problem, Recipe, Section, TeacherRecipe

MAX_RECIPE_BYTES = 1_000_000  # a recipe is a page; anything larger is not one
TEACHER_PREFIX = "teacher:"
OVERRIDE = "override"


@dataclass(frozen=True)
class Document:
    """A recipe's raw values, where each came from, and its text."""

    label: str
    lines: tuple[str, ...]
    values: Any
    places: dict[Loc, tuple[int, int]]
    overridden: frozenset[Loc]


def builtin_recipes() -> dict[str, Path]:
    """Name and path of every recipe that ships with the package."""
    folder = files("recipes")
    return {path.stem: path for path in sorted(Path(str(folder)).glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """The file of a path or a built-in name.

    Raises:
        RecipeError: neither exists.
    """
    builtin = builtin_recipes()
    if recipe in builtin:
        return builtin[recipe]
    path = Path(recipe)
    if path.is_file():
        return path
    close = difflib.get_close_matches(recipe, builtin, n=1)
    hint = f" - did you mean {close[0]!r}?" if close else ""
    raise RecipeError(
        f"{recipe}: no such recipe file or built-in recipe{hint}",
        fix=f"Give a file, or one of: {', '.join(builtin)}.",
    )


def load_job(recipe: str, overrides: Sequence[str] = ()) -> tuple[Recipe, TeacherRecipe | None]:
    """A recipe and, if it is a family that trains its teacher first, the teacher's recipe.

    Overrides are ``KEY=VALUE`` for the recipe and ``teacher:KEY=VALUE`` for the teacher's.

    Raises:
        RecipeError: every problem of both files.
    """
    own = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    for_teacher = [
        text.removeprefix(TEACHER_PREFIX) for text in overrides if text.startswith(TEACHER_PREFIX)
    ]
    path = find_recipe(recipe)
    loaded = load_recipe(path, own)
    if not isinstance(loaded, FamilyRecipe) or loaded.teacher.train is None:
        if for_teacher:
            raise RecipeError(
                f"{TEACHER_PREFIX}{for_teacher[0]}: this recipe trains no teacher",
                fix="Drop the override.",
            )
        return loaded, None
    teacher_path = path.parent / loaded.teacher.train
    if not teacher_path.is_file():
        raise RecipeError(
            f"{path.name}: teacher.train: {teacher_path} does not exist",
            fix="Give the teacher recipe's path relative to this recipe.",
        )
    teacher = load_recipe(teacher_path, for_teacher)
    if not isinstance(teacher, TeacherRecipe):
        raise RecipeError(
            f"{teacher_path}: teacher.train must name a recipe with stages",
            fix="Use a teacher recipe.",
        )
    return loaded, teacher


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in one file.

    Raises:
        RecipeError: every problem at once, with line, column and a suggestion.
    """
    document = _read(path)
    problems = _apply_overrides(document, overrides)
    kind = _kind(document)
    checked, found = _check(kind, document.values)
    problems += found
    if problems or checked is None:
        raise RecipeError(
            _render(document, problems), fix="Correct the lines above; nothing was started."
        )
    return checked


def resolved_yaml(recipe: str, overrides: Sequence[str], loaded: Recipe) -> str:
    """The recipe with every default written out and, behind each value, where it came from."""
    document = _read(find_recipe(recipe))
    _apply_overrides(document, overrides)
    tree = _commented(
        loaded.model_dump(mode="json", by_alias=True, exclude_none=True), (), document
    )
    stream = io.StringIO()
    YAML().dump(tree, stream)
    return stream.getvalue()


def _commented(value: Any, loc: Loc, document: Document) -> Any:
    if isinstance(value, dict):
        node = CommentedMap()
        for key, entry in value.items():
            here = (*loc, key)
            node[key] = _commented(entry, here, document)
            if not isinstance(entry, dict | list) or (
                isinstance(entry, list) and node[key].fa.flow_style()
            ):
                node.yaml_add_eol_comment(_origin(here, document), key)
        return node
    if isinstance(value, list):
        items = CommentedSeq(
            _commented(entry, (*loc, i), document) for i, entry in enumerate(value)
        )
        if not any(isinstance(entry, dict | list) for entry in value):
            items.fa.set_flow_style()
        return items
    return value


def _origin(loc: Loc, document: Document) -> str:
    prefixes = [loc[:length] for length in range(len(loc), 0, -1)]
    if any(prefix in document.overridden for prefix in prefixes):
        return OVERRIDE
    scalar_parent = any(
        prefix in document.places and _is_scalar(document, prefix) for prefix in prefixes
    )
    return "recipe" if loc in document.places or scalar_parent else "default"


def _is_scalar(document: Document, loc: Loc) -> bool:
    node: Any = document.values
    for key in loc:
        node = node[key]
    return not isinstance(node, dict | list)


def _read(path: Path) -> Document:
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: larger than 1 MB, so not a recipe", fix="Give a recipe file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(
            f"{path}: cannot be read as text ({error})", fix="Give a UTF-8 YAML file."
        ) from error
    try:
        tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        message = f"{path.name}{where}: {str(error.problem).splitlines()[0]}"
        raise RecipeError(message, fix="Correct the YAML at that line.") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path.name}: not YAML ({str(error).splitlines()[0]})", fix="Correct the file."
        ) from error
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            f"{path.name}:1:1: a recipe is a mapping of keys to values",
            fix="Start from `distill recipes copy`.",
        )
    places: dict[Loc, tuple[int, int]] = {}
    values = _plain(tree, (), places)
    return Document(path.name, tuple(text.splitlines()), values, places, frozenset())


def _plain(node: Any, loc: Loc, places: dict[Loc, tuple[int, int]]) -> Any:
    """The tree as dicts, lists and scalars, noting the line and column (from 0) of every value."""
    if isinstance(node, CommentedMap):
        for key in node:
            position = (
                node.lc.value(key)
                if not isinstance(node[key], CommentedMap | CommentedSeq)
                else node.lc.key(key)
            )
            places[(*loc, key)] = position
            places[(*loc, key, "<key>")] = node.lc.key(key)
        return {key: _plain(value, (*loc, key), places) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*loc, index)] = node.lc.item(index)
        return [_plain(value, (*loc, index), places) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Sets the values of ``KEY=VALUE`` texts in place; dotted keys, list items by number."""
    problems: list[Problem] = []
    touched: set[Loc] = set()
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            problems.append(((OVERRIDE, text), "write KEY=VALUE, such as schedule.batch=32"))
            continue
        loc: Loc = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        try:
            value = _plain(YAML().load(raw), (), {}) if raw else None
        except YAMLError:
            problems.append(((OVERRIDE, text), f"{raw!r} is not a YAML value"))
            continue
        node = document.values
        for part in loc[:-1]:
            if isinstance(node, dict) and isinstance(node.get(part, {}), dict | list):
                node = node.setdefault(part, {})
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                node = None
                break
        last = loc[-1]
        is_item = isinstance(node, list) and isinstance(last, int) and last < len(node)
        if isinstance(node, dict) or is_item:
            node[last] = value  # type: ignore[index]  # a number if and only if the node is a list
            touched.add(loc)
        else:
            problems.append(((OVERRIDE, text), f"there is no {key!r} in this recipe"))
    object.__setattr__(document, "overridden", frozenset(touched))
    return problems


def _kind(document: Document) -> type[FamilyRecipe] | type[TeacherRecipe]:
    is_family, is_teacher = "students" in document.values, "stages" in document.values
    if is_family == is_teacher:
        raise RecipeError(
            f"{document.label}:1:1: needs either 'students' (a family) or 'stages' (a teacher), "
            f"{'not both' if is_family else 'has neither'}",
            fix="Start from `distill recipes copy quickstart my.yaml`.",
        )
    return FamilyRecipe if is_family else TeacherRecipe


def _check(
    kind: type[FamilyRecipe] | type[TeacherRecipe], values: dict[str, Any]
) -> tuple[Recipe | None, list[Problem]]:
    """The recipe if all is well, and otherwise the problems of fields and, over what validated, of the rules."""
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        problems += [_explain(kind, tuple(entry["loc"]), entry) for entry in error.errors()]
    problems += list(RULES[kind](_valid_parts(kind, values)))
    return recipe, problems


def _valid_parts(kind: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """Every top-level part that validates on its own; lists of sections item by item, keyed by their place."""
    parts: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        key = field.alias or name
        if key not in values:
            if not field.is_required():
                parts[key] = field.default
            continue
        item_type = _item_type(field.annotation)
        annotation: Any = field.annotation
        for extra in field.metadata:
            annotation = typing.Annotated[annotation, extra]
        if item_type is None:
            valid = _validated(annotation, values[key])
            if valid is not None:
                parts[key] = valid
        elif isinstance(values[key], list):
            items = {index: _validated(item_type, value) for index, value in enumerate(values[key])}
            parts[key] = {index: item for index, item in items.items() if item is not None}
    return parts


def _item_type(annotation: Any) -> Any:
    """The item type of ``tuple[X, ...]``, where X is a section; None for everything else."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None


def _validated(annotation: Any, value: Any) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return None


def _explain(kind: type[Section], loc: Loc, entry: Any) -> Problem:
    """One pydantic error as a sentence with the value and what is allowed."""
    message, value = str(entry["msg"]), entry["input"]
    if entry["type"] == "extra_forbidden":
        section = _section_at(kind, loc[:-1])
        known = (
            [field.alias or name for name, field in section.model_fields.items()] if section else []
        )
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f" - did you mean {close[0]!r}?" if close else f" - known here: {', '.join(known)}"
        return (*loc, "<key>"), f"unknown key {_dotted(loc)!r}{hint}"
    if entry["type"] == "missing":
        return loc, "is missing"
    if entry["type"] == "value_error":
        return loc, message.removeprefix("Value error, ")
    return loc, f"{message} (got {value!r})"


def _section_at(kind: Any, loc: Loc) -> type[Section] | None:
    """The section class at a place of the tree, found through the annotations."""
    current: Any = kind
    for key in loc:
        if isinstance(key, int):
            continue
        section = _as_section(current)
        if section is None:
            return None
        matches = [
            field for name, field in section.model_fields.items() if (field.alias or name) == key
        ]
        if not matches:
            return None
        current = matches[0].annotation
    return _as_section(current)


def _as_section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        found = _as_section(argument)
        if found is not None:
            return found
    return None


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc if part != "<key>")


def _render(document: Document, problems: Sequence[Problem]) -> str:
    """All problems in the order of the file, each with its line and a mark under the place."""
    placed = []
    for loc, message in problems:
        if loc and loc[0] == OVERRIDE:
            placed.append(((1 << 30, 0), f"override {loc[1]!r}: {message}"))
            continue
        if any(loc[:length] in document.overridden for length in range(1, len(loc) + 1)):
            placed.append(((1 << 30, 1), f"override {_dotted(loc)!r}: {message}"))
            continue
        known = [
            loc[:length] for length in range(len(loc), 0, -1) if loc[:length] in document.places
        ]
        line, column = document.places[known[0]] if known else (0, 0)
        what = message if message.startswith("unknown key") else f"{_dotted(loc)}: {message}"
        text = f"{document.label}:{line + 1}:{column + 1}: {what}"
        if line < len(document.lines):
            text += f"\n{line + 1:6} | {document.lines[line]}\n       | {' ' * column}^"
        placed.append(((line, column), text))
    placed.sort(key=lambda item: item[0])
    unique = list(dict.fromkeys(text for _, text in placed))
    count = f"{len(unique)} problem{'s' if len(unique) > 1 else ''} in {document.label}."
    return "\n".join([*unique, count])


def copy_recipe(recipe: str, target: Path) -> list[Path]:
    """Copies a recipe to ``target`` and the teacher recipe it names beside it; returns what was written.

    Raises:
        RecipeError: a file is in the way.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(source)
    copies = {target: source}
    if isinstance(loaded, FamilyRecipe) and loaded.teacher.train is not None:
        copies[target.parent / loaded.teacher.train] = source.parent / loaded.teacher.train
    for path in copies:
        if path.exists():
            raise RecipeError(
                f"{path}: exists already", fix="Choose another name; nothing was written."
            )
    for path, original in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(original.read_text())
    return list(copies)
