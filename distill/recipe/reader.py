"""YAML to recipe, with every problem at once, each at its line and column.

YAML 1.2 by ruamel: ``2e-4`` is a number, ``off`` is text, and a repeated key is an error instead of
a silent last-one-wins. Two passes over a file: pydantic checks each key, then the rules across keys
run on every key that is valid on its own, so that nobody repairs a recipe in two rounds.

Shorthands (``global: 64``, ``- vits16``) are written out right after reading: overrides, rules and
the origin of a value then know one form only.

Longer than 400 lines: reading, positions and messages share the places of values, and little else.
"""

import copy
import difflib
import io
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning

from distill.errors import RecipeError
from distill.recipe.keys import (
    BUILTIN_PHOTOGRAPHS,
    FamilyRecipe,
    Loc,
    Problem,
    Recipe,
    Section,
    TeacherRecipe,
)
from distill.recipe.rules import Parts, find_conflicts, items_of

MAX_RECIPE_BYTES = 50_000  # a recipe is a page; the slowest text of this size is read in a second
MAX_OPEN = 50  # brackets at once: the reader's time grows with the square of the depth
MAX_VALUES = 10_000  # a few nested YAML aliases stand for billions of values
TEACHER_PREFIX = "teacher:"
KEY = "<key>"  # ends a place that means the key itself, not its value
OVERRIDE = "override"
EXPECTED = "Input should be "  # how pydantic begins; what follows is what is allowed
Kind = type[FamilyRecipe] | type[TeacherRecipe]


@dataclass(frozen=True)
class Document:
    """A recipe's raw values, the line and column (from 0) of each, and its text."""

    label: str
    lines: tuple[str, ...]
    values: dict[str, Any]
    places: Mapping[Loc, tuple[int, int]]
    overridden: frozenset[Loc] = frozenset()


@dataclass(frozen=True)
class Reading:
    """A recipe after the first pass; ``recipe`` is None if a key is wrong."""

    document: Document
    kind: Kind
    recipe: Recipe | None
    parts: Parts
    problems: tuple[Problem, ...]


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
    close = difflib.get_close_matches(path.stem, builtin, n=1)
    hint = f" - did you mean {close[0]!r}?" if close else ""
    raise RecipeError(
        f"{recipe}: no such recipe file or built-in recipe{hint}",
        fix=f"Give a file, or one of: {', '.join(builtin)}.",
    )


def load_job(
    recipe: str, overrides: Sequence[str] = (), *, check_folders: bool = False
) -> tuple[Recipe, TeacherRecipe | None]:
    """A recipe and, if it is a family that trains its teacher first, the teacher's recipe.

    Overrides are ``KEY=VALUE`` for the recipe and ``teacher:KEY=VALUE`` for the teacher's.
    ``check_folders`` looks whether the folders that the recipes name are there, too.

    Raises:
        RecipeError: every problem of both files.
    """
    own = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    theirs = [text for text in overrides if text.startswith(TEACHER_PREFIX)]
    path = find_recipe(recipe)
    first = _read_fields(path, own)
    problems = list(first.problems)
    second: Reading | None = None
    train = first.parts.get(("teacher", "train"))
    if train is None:
        problems += [((OVERRIDE, text), "this recipe trains no teacher") for text in theirs]
    elif not (path.parent / train).is_file():
        place: Loc = ("teacher", "train")
        problems.append(
            (place, f"{path.parent / train} does not exist; give its path relative to this recipe")
        )
    else:
        second = _read_fields(
            path.parent / train, [text.removeprefix(TEACHER_PREFIX) for text in theirs]
        )
        if second.kind is not TeacherRecipe:
            problems.append(
                (("teacher", "train"), f"{train!r} has no stages, so trains no teacher")
            )
            second = None
    problems += find_conflicts(first.parts, None if second is None else second.parts)
    problems += _missing_folders(first.parts) if check_folders else []
    texts = _render(first.document, problems)
    if second is not None:
        problems = [*second.problems, *find_conflicts(second.parts)]
        problems += _missing_folders(second.parts) if check_folders else []
        texts += _render(second.document, problems)
    _refuse(texts)
    assert first.recipe is not None, "no problem was found"
    if second is None:
        return first.recipe, None
    assert isinstance(second.recipe, TeacherRecipe), "no problem was found"
    return first.recipe, second.recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in one file; a teacher's recipe that it names is not read.

    Raises:
        RecipeError: every problem at once, with line, column and a suggestion.
    """
    reading = _read_fields(path, overrides)
    _refuse(_render(reading.document, [*reading.problems, *find_conflicts(reading.parts)]))
    assert reading.recipe is not None, "no problem was found"
    return reading.recipe


def names_teacher_recipe(recipe: str, overrides: Sequence[str] = ()) -> bool:
    """Whether the recipe, right or wrong in other places, trains its teacher by another recipe."""
    own = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    return _read_fields(find_recipe(recipe), own).parts.get(("teacher", "train")) is not None


def resolved_yaml(recipe: str, overrides: Sequence[str], loaded: Recipe) -> str:
    """The recipe with every default written out and, behind each value, where it came from.

    Keys that are null are left out: they do not apply.
    """
    document, _ = _override(_read(find_recipe(recipe)), overrides)
    dump = loaded.model_dump(mode="json", by_alias=True, exclude_none=True)
    stream = io.StringIO()
    YAML().dump(_commented(dump, (), document), stream)
    return stream.getvalue()


def copy_recipe(recipe: str, target: Path) -> list[Path]:
    """Copies a recipe to ``target``, and the teacher recipe it names beside it; returns both paths.

    Raises:
        RecipeError: another file is in the way; nothing was written.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(source)
    copies = {target: source}
    if isinstance(loaded, FamilyRecipe) and loaded.teacher.train is not None:
        copies[target.parent / loaded.teacher.train] = source.parent / loaded.teacher.train
    for path, original in copies.items():
        is_same = path != target and path.is_file() and path.read_text() == original.read_text()
        if path.exists() and not is_same:
            raise RecipeError(
                f"{path}: exists already", fix="Choose another name or folder; nothing was written."
            )
    for path, original in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(original.read_text())
    return list(copies)


# Text to values.


def _read(path: Path) -> Document:
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{path}: larger than {MAX_RECIPE_BYTES // 1000} kB, so not a recipe",
            fix="Give a recipe file; name many files by a pattern.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(
            f"{path}: cannot be read as text ({error})", fix="Give a UTF-8 YAML file."
        ) from error
    if _depth(text) > MAX_OPEN:
        raise RecipeError(
            f"{path.name}: more than {MAX_OPEN} brackets are open at once, so not a recipe",
            fix="Close them.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)  # the last one would win
            tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        message = f"{path.name}{where}: {str(error.problem or error.context).splitlines()[0]}"
        raise RecipeError(message, fix="Correct the YAML at that line.") from error
    except Exception as error:  # ruamel raises whatever a strange document leads it to
        raise RecipeError(
            f"{path.name}: not YAML ({_first_line(error)})", fix="Correct the file."
        ) from error
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            f"{path.name}:1:1: a recipe is a mapping of keys to values",
            fix="Start from `distill recipes copy quickstart my.yaml`.",
        )
    places: dict[Loc, tuple[int, int]] = {}
    values = _plain(tree, (), places)
    _write_out(values, places)
    return Document(path.name, tuple(text.split("\n")), values, places)


def _depth(text: str) -> int:
    """The most brackets that are open at once, wherever they stand."""
    depth = most = 0
    for letter in text:
        if letter in "[{":
            depth += 1
            most = max(most, depth)
        elif letter in "]}":
            depth = max(0, depth - 1)
    return most


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(node: Any, loc: Loc, places: dict[Loc, tuple[int, int]]) -> Any:
    """The tree as dicts, lists and scalars, noting the place of every value in ``places``."""
    if len(places) > MAX_VALUES:
        raise RecipeError(
            f"more than {MAX_VALUES} values, so not a recipe", fix="Use fewer or no YAML aliases."
        )
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            if not isinstance(key, str | int):
                raise RecipeError(
                    f"line {node.lc.line + 1}: {str(key)[:40]!r} is no key", fix="A key is a word."
                )
            if key not in (node.lc.data or {}):  # merged by `<<`: it has no place of its own here
                places[*loc, key] = places[*loc, key, KEY] = places.get(loc, (0, 0))
                continue
            is_scalar = not isinstance(value, CommentedMap | CommentedSeq)
            here = node.lc.value(key) if is_scalar else node.lc.key(key)
            places[*loc, key] = here or places.get(loc, (0, 0))  # tagged values may have no place
            places[*loc, key, KEY] = node.lc.key(key) or places[*loc, key]
        return {key: _plain(value, (*loc, key), places) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[*loc, index] = node.lc.item(index) or places.get(loc, (0, 0))
        return [_plain(value, (*loc, index), places) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's scalars remember how they were written
        if isinstance(node, kind):
            return kind(node)
    return node


def _write_out(values: dict[str, Any], places: dict[Loc, tuple[int, int]]) -> None:
    """Replaces shorthands by what they stand for, in place: ``global: 64``, ``- vits16``."""
    crops, students = values.get("crops"), values.get("students")
    slots: list[tuple[Any, Loc, str]] = [(values, ("model",), "arch")]
    if isinstance(crops, dict):
        slots += [(crops, ("crops", key), "size") for key in ("global", "local")]
    if isinstance(students, list):
        slots += [(students, ("students", index), "arch") for index in range(len(students))]
    for holder, place, key in slots:
        here = place[-1]
        is_there = isinstance(holder, list) or here in holder
        if is_there and isinstance(holder[here], int | float | str):
            holder[here] = {key: holder[here]}
            if place in places:
                places[*place, key] = places[place]


def _override(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """The document with the values of ``KEY=VALUE`` texts; list items go by their number."""
    problems: list[Problem] = []
    values = copy.deepcopy(document.values)
    touched: set[Loc] = set()
    for text in overrides:
        key, equals, raw = text.partition("=")
        loc: Loc = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        if not equals or not all(str(part) for part in loc):
            problems.append(((OVERRIDE, text), "write KEY=VALUE, such as schedule.batch=32"))
            continue
        try:
            value = _plain(YAML().load(raw), (), {})
        except RecipeError:
            raise
        except Exception:  # ruamel raises whatever a strange document leads it to
            problems.append(((OVERRIDE, text), f"{raw!r} is not a YAML value"))
            continue
        holder, last = _holder(values, loc), loc[-1]
        is_item = isinstance(holder, list) and isinstance(last, int) and last < len(holder)
        if not isinstance(holder, dict) and not is_item:
            problems.append(((OVERRIDE, text), f"there is no {key!r} in this recipe"))
            continue
        holder[last] = value
        touched.add(loc)
        _write_out(values, {})
    return replace(document, values=values, overridden=frozenset(touched)), problems


def _holder(values: dict[str, Any], loc: Loc) -> Any:
    """The dict or list that holds the last part of ``loc``; sections not written yet are added."""
    node: Any = values
    for part in loc[:-1]:
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return None
    return node


# Values to models.


def _read_fields(path: Path, overrides: Sequence[str]) -> Reading:
    document, problems = _override(_read(path), overrides)
    kind = _kind(document)
    recipe: Recipe | None = None
    errors: list[Any] = []
    try:
        recipe = kind.model_validate(document.values)
    except ValidationError as error:
        errors = error.errors()
    by_place: dict[Loc, list[Any]] = {}
    for entry in errors:
        by_place.setdefault(_place(kind, entry), []).append(entry)
    problems += [(loc, _explain(kind, loc, entries)) for loc, entries in by_place.items()]
    parts = dict(_valid_parts(kind, document.values, (), by_place.keys()))
    return Reading(document, kind, None if problems else recipe, parts, tuple(problems))


def _kind(document: Document) -> Kind:
    kinds: dict[str, Kind] = {"students": FamilyRecipe, "stages": TeacherRecipe}
    found = [key for key in kinds if key in document.values]
    if not found:  # a misspelt one is told from what it is close to, and reported as unknown
        found = [k for k in kinds if difflib.get_close_matches(k, map(str, document.values), n=1)]
    if len(found) != 1:
        raise RecipeError(
            f"{document.label}:1:1: needs either 'students' (a family) or 'stages' (a teacher), "
            f"{'not both' if found else 'has neither'}",
            fix="Start from `distill recipes copy quickstart my.yaml`.",
        )
    return kinds[found[0]]


def _valid_parts(
    kind: type[Section], given: Mapping[Any, Any], loc: Loc, wrong: Collection[Loc]
) -> Iterator[tuple[Loc, Any]]:
    """Place and value, given or default, of every key below ``loc`` that pydantic found valid."""
    for key, field in _fields(kind).items():
        here = (*loc, key)
        if here in wrong or (key not in given and field.is_required()):
            continue
        value = given.get(key, field.default)
        section = _as_section(field.annotation)
        if isinstance(value, Section):
            value = value.model_dump(by_alias=True)
        if section is not None and isinstance(value, dict):
            yield from _valid_parts(section, value, here, wrong)
        elif section is not None and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _valid_parts(section, item, (*here, index), wrong)
        elif not any(place[: len(here)] == here for place in wrong):
            yield here, value


def _missing_folders(parts: Parts) -> Iterator[Problem]:
    """Named folders that are not there, and image folders without an image."""
    from distill.data.sources import CONTAINERS, LIST_SUFFIXES, SUFFIXES

    for index in items_of(parts, "data", "sources"):
        place: Loc = ("data", "sources", index, "path")
        path = parts.get(place)
        if path is None or path == BUILTIN_PHOTOGRAPHS:
            continue
        if any(mark in Path(path).name for mark in "*?[") and not Path(path).exists():
            if not any(Path(path).parent.glob(Path(path).name)):
                yield place, f"{path!r} matches nothing"
            continue
        known, suffix = {*SUFFIXES, *CONTAINERS}, Path(path).suffix.lower()
        if Path(path).is_file() and suffix in {*CONTAINERS, *LIST_SUFFIXES}:
            continue
        if not Path(path).is_dir():
            kinds = "a folder with images, a .tar or .parquet file, or a .txt list"
            yield place, f"{path!r} is not there or no source of images - give {kinds}"
        elif not any(file.suffix.lower() in known for file in Path(path).rglob("*")):
            kinds = ", ".join(sorted(suffix[1:] for suffix in known))
            yield place, f"{path!r} holds no image ({kinds}), in no subfolder either"
    weights = parts.get(("teacher", "weights"))
    if weights is not None and not Path(weights).exists():
        yield ("teacher", "weights"), f"{weights!r} is not there: a folder or file of weights"


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _as_section(annotation: Any) -> type[Section] | None:
    """The section class within an annotation: itself, optional, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_as_section(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


def _section_at(kind: type[Section], loc: Loc) -> tuple[type[Section] | None, Loc]:
    """The section at ``loc`` (None: a value is there), and ``loc`` without pydantic's own marks."""
    section: type[Section] | None = kind
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            continue
        if section is None or part not in _fields(section):
            return section, loc[:depth]
        section = _as_section(_fields(section)[part].annotation)
    return section, loc


# Problems to text.


def _place(kind: Kind, entry: Any) -> Loc:
    loc = tuple(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return (*loc, KEY)
    return loc if entry["type"] == "invalid_key" else _section_at(kind, loc)[1]


def _explain(kind: Kind, loc: Loc, entries: Sequence[Any]) -> str:
    """The errors at one place as a sentence with the value and what is allowed."""
    first = entries[0]
    value = first["input"]
    if loc[-1] == KEY:
        return f"unknown key {_dotted(loc)!r}{_similar_key(kind, loc[:-1])}"
    if first["type"] == "missing":
        return "is missing"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    allowed = [str(entry["msg"]).removeprefix(EXPECTED) for entry in entries]
    is_plain = all(str(entry["msg"]).startswith(EXPECTED) for entry in entries)
    message = (EXPECTED if is_plain else "") + " or ".join(dict.fromkeys(allowed))
    return f"{message} (got {value!r}){_meant(first['type'], value)}"


def _similar_key(kind: Kind, loc: Loc) -> str:
    section, _ = _section_at(kind, loc[:-1])
    known = [] if section is None else list(_fields(section))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    places = [place for place in _all_keys(kind, ()) if place[-1] == loc[-1]]
    elsewhere = sorted(places, key=len)  # the least hidden one first
    if close or elsewhere:
        return f" - did you mean {close[0] if close else _dotted(elsewhere[0])!r}?"
    return f" - known here: {', '.join(known)}"


def _all_keys(kind: type[Section], loc: Loc) -> Iterator[Loc]:
    for key, field in _fields(kind).items():
        yield (*loc, key)
        section = _as_section(field.annotation)
        if section is not None:
            yield from _all_keys(section, (*loc, key))


def _meant(error_type: str, value: Any) -> str:
    """A guess at what was meant by a value of the wrong type; '' for none."""
    guess: object = None
    if error_type == "string_type" and isinstance(value, int | float):
        guess = f"'{value}', in quotes"
    elif error_type in ("int_type", "float_type") and isinstance(value, str):
        text = value.replace(",", "").replace(" ", "")
        is_number = text.replace(".", "", error_type == "float_type").isdecimal()
        guess = f"{text}, without quotes" if is_number else None
    elif error_type == "int_type" and isinstance(value, float) and value.is_integer():
        guess = int(value)
    elif error_type == "tuple_type" and not isinstance(value, dict):
        guess = f"a list, [{value}]"
    return "" if guess is None else f" - did you mean {guess}?"


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc if part != KEY)


def _render(document: Document, problems: Sequence[Problem]) -> list[str]:
    """All problems of a file in its order, overrides last, each with its line and a mark."""
    placed: list[tuple[tuple[int, int], str]] = []
    for loc, message in problems:
        what = message if message.startswith("unknown key") else f"{_dotted(loc)}: {message}"
        if loc[:1] == (OVERRIDE,):
            placed.append(((MAX_RECIPE_BYTES, 0), f"override {loc[1]!r}: {message}"))
        elif _is_overridden(loc, document):
            placed.append(((MAX_RECIPE_BYTES, 1), f"override {_dotted(loc)!r}: {message}"))
        else:
            line, column = _position(loc, document)
            shown = document.lines[min(line, len(document.lines) - 1)]  # YAML knows more line ends
            mark = f"{line + 1:6} | {shown}\n       | {' ' * column}^"
            text = f"{document.label}:{line + 1}:{column + 1}: {what}\n{mark}"
            placed.append(((line, column), text))
    placed.sort(key=lambda item: item[0])
    texts = list(dict.fromkeys(text for _, text in placed))
    if texts:
        count = f"{len(texts)} problem{'s' if len(texts) > 1 else ''}"
        texts.append(f"{count} in {document.label}.")
    return texts


def _position(loc: Loc, document: Document) -> tuple[int, int]:
    """Line and column of a place, or of the closest section around it that the file has."""
    known = (loc[:length] for length in range(len(loc), 0, -1) if loc[:length] in document.places)
    place = next(known, None)
    return (0, 0) if place is None else document.places[place]


def _is_overridden(loc: Loc, document: Document) -> bool:
    """The value at ``loc``, or its absence from the file, is an override's doing."""
    if any(loc[:length] in document.overridden for length in range(1, len(loc) + 1)):
        return True
    bare = tuple(part for part in loc if part != KEY)
    is_written = bare in document.places
    return not is_written and any(place[: len(bare)] == bare for place in document.overridden)


def _refuse(texts: Sequence[str]) -> None:
    if texts:
        raise RecipeError("\n".join(texts), fix="Correct the lines above; nothing was started.")


# Models to text.


def _commented(value: Any, loc: Loc, document: Document) -> Any:
    if isinstance(value, dict):
        node = CommentedMap()
        for key, entry in value.items():
            here = (*loc, key)
            node[key] = _commented(entry, here, document)
            is_flow = isinstance(entry, list) and node[key].fa.flow_style()
            if is_flow or not isinstance(entry, dict | list):
                node.yaml_add_eol_comment(_origin(here, document), key)
        return node
    if isinstance(value, list):
        items = CommentedSeq(_commented(item, (*loc, i), document) for i, item in enumerate(value))
        if not any(isinstance(item, dict | list) for item in value):
            items.fa.set_flow_style()
        return items
    return value


def _origin(loc: Loc, document: Document) -> str:
    node: Any = document.values
    for key in loc:
        is_there = key in node if isinstance(node, dict) else isinstance(node, list)
        if not is_there:
            return "default"
        node = node[key]
    touched = any(loc[:length] in document.overridden for length in range(1, len(loc) + 1))
    return OVERRIDE if touched else "recipe"
