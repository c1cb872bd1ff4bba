"""A recipe file as raw values, each with its line and column.

YAML 1.2 by ruamel: ``2e-4`` is a number, ``off`` is text, and a repeated key is an error instead of
a silent last-one-wins. Shorthands (``global: 64``, ``- vits16``) are written out right after reading:
overrides, rules and the origin of a value then know one form only.
"""

import copy
import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning

from distill.errors import RecipeError

Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]

MAX_RECIPE_BYTES = 50_000  # a recipe is a page; the slowest text of this size is read in a second
MAX_OPEN = 50  # brackets at once: the reader's time grows with the square of the depth
RESOLVED_FACTOR = 20  # a resolved recipe has defaults and origins written out: as often that size
MAX_VALUES = 10_000  # a few nested YAML aliases stand for billions of values
KEY = "<key>"  # ends a place that means the key itself, not its value
OVERRIDE = "override"
RENAMED = {
    "family_published": "family_reported (as in the report) or family_released (as in the file)"
}
RESOLVED = "recipe.resolved.yaml"  # in a run folder, which is read from then on
RESOLVED_TEACHER = "teacher.resolved.yaml"  # beside it, where the recipe names one


class NotYamlError(RecipeError):
    """The file at ``path`` is not YAML; its cause is what the reader found."""

    def __init__(
        self, message: str, path: str = "", lines: Sequence[str] = (), **facts: Any
    ) -> None:
        """Keeps the text, in which the command line looks for the mistake."""
        super().__init__(message, **{"fix": "Correct the YAML at that line.", **facts})
        self.path, self.lines = path, lines


@dataclass(frozen=True)
class Document:
    """A recipe's raw values, the line and column (from 0) of each, and its text."""

    label: str
    lines: tuple[str, ...]
    values: dict[str, Any]
    marks: Mapping[Loc, tuple[int, int]]
    overridden: Mapping[Loc, str] = field(default_factory=dict)  # what stands after ``=``


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
    beside = list(map(str, path.parent.glob("*.y*ml")))
    matches = difflib.get_close_matches
    close = matches(path.stem, builtin, n=1) or matches(recipe, beside, n=1, cutoff=0.8)
    hint = f" - did you mean {close[0]!r}?" if close else ""
    if recipe in RENAMED:
        hint = f"; it was renamed: {RENAMED[recipe]}"
    raise RecipeError(
        f"{recipe}: no such recipe file or built-in recipe{hint}",
        fix=f"Give a file, or one of: {', '.join(builtin)}.",
    )


def read_document(path: Path) -> Document:
    """Reads a recipe file without checking its keys.

    Raises:
        RecipeError: it is too large, not text, or not YAML with a mapping at the top.
    """
    factor = RESOLVED_FACTOR if path.name in {RESOLVED, RESOLVED_TEACHER} else 1
    if path.stat().st_size > MAX_RECIPE_BYTES * factor:
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
    lines = tuple(line.rstrip("\r") for line in text.split("\n"))
    if _depth(text) > MAX_OPEN:
        raise RecipeError(
            f"{path}: more than {MAX_OPEN} brackets are open at once, so not a recipe",
            fix="Close them.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)  # the last one would win
            tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark, what = error.problem_mark, str(error.problem or error.context).splitlines()[0]
        line, column = (mark.line, mark.column) if mark else (0, 0)
        text = f"{path}:{line + 1}:{column + 1}: {what}\n{marked(lines, line, column)}"
        raise NotYamlError(text, path=str(path), lines=lines) from error
    except Exception as error:  # ruamel raises whatever a strange document leads it to
        raise RecipeError(
            f"{path}: not YAML ({_first_line(error)})", fix="Correct the file."
        ) from error
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            f"{path}:1:1: a recipe is a mapping of keys to values, such as `name: mine`",
            fix="Start from `distill recipes copy quickstart my.yaml`.",
        )
    marks: dict[Loc, tuple[int, int]] = {}
    values = _plain(tree, (), marks, MAX_VALUES * factor)
    _write_out(values, marks)
    return Document(str(path), lines, values, marks)


def marked(lines: Sequence[str], line: int, column: int) -> str:
    """A line of a file with its number, and a mark under a column; both count from 0."""
    shown = lines[min(line, len(lines) - 1)]  # YAML knows more line ends
    space = "".join("\t" if letter == "\t" else " " for letter in shown[:column].ljust(column))
    return f"{line + 1:6} | {shown}\n       | {space}^"


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


def _plain(node: Any, loc: Loc, marks: dict[Loc, tuple[int, int]], most: int = MAX_VALUES) -> Any:
    """The tree as dicts, lists and scalars, noting the place of every value in ``marks``."""
    if len(marks) > most:
        raise RecipeError(
            f"more than {most} values, so not a recipe", fix="Use fewer or no YAML aliases."
        )
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            if not isinstance(key, str | int):
                raise RecipeError(
                    f"line {node.lc.line + 1}: {str(key)[:40]!r} is no key", fix="A key is a word."
                )
            if key not in (node.lc.data or {}):  # merged by `<<`: it has no position here
                marks[*loc, key] = marks[*loc, key, KEY] = marks.get(loc, (0, 0))
                continue
            is_scalar = not isinstance(value, CommentedMap | CommentedSeq)
            here = node.lc.value(key) if is_scalar else node.lc.key(key)
            marks[*loc, key] = here or marks.get(loc, (0, 0))  # tagged values may have no place
            marks[*loc, key, KEY] = node.lc.key(key) or marks[*loc, key]
        return {key: _plain(value, (*loc, key), marks, most) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            marks[*loc, index] = node.lc.item(index) or marks.get(loc, (0, 0))
        return [_plain(value, (*loc, index), marks, most) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's scalars remember how they were written
        if isinstance(node, kind):
            return kind(node)
    return node


def _write_out(values: dict[str, Any], marks: dict[Loc, tuple[int, int]]) -> None:
    """Replaces shorthands by what they stand for, in place: ``global: 64``, ``- vits16``."""
    crops, students = values.get("crops"), values.get("students")
    slots: list[tuple[Any, Loc, str]] = [(values, ("model",), "arch")]
    if isinstance(crops, dict):
        slots += [(crops, ("crops", key), "size") for key in ("global", "local")]
    if isinstance(students, list):
        slots += [(students, ("students", index), "arch") for index in range(len(students))]
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if isinstance(sources, list):
        slots += [(sources, ("data", "sources", index), "path") for index in range(len(sources))]
    networks: list[tuple[Loc, Any]] = [(("model",), values.get("model"))]
    if isinstance(students, list):
        networks += [(("students", index), each) for index, each in enumerate(students)]
    slots += [(each, (*loc, "init"), "from") for loc, each in networks if isinstance(each, dict)]
    for holder, key_path, key in slots:
        here = key_path[-1]
        is_there = isinstance(holder, list) or here in holder
        if is_there and isinstance(holder[here], int | float | str):
            holder[here] = {key: holder[here]}
            if key_path in marks:
                marks[*key_path, key] = marks[key_path]


def with_overrides(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """The document with the values of ``KEY=VALUE`` texts; list items go by their number."""
    problems: list[Problem] = []
    values = copy.deepcopy(document.values)
    touched: dict[Loc, str] = {}
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
            hint = _item_hint(values, loc)
            problems.append(((OVERRIDE, text), f"there is no {key!r} in this recipe{hint}"))
            continue
        holder[last] = value
        touched[loc] = raw
        _write_out(values, {})
    return replace(document, values=values, overridden=touched), problems


def _item_hint(values: Any, loc: Loc) -> str:
    """How to name an item of the first list on the way, which goes by its number."""
    for depth, part in enumerate(loc):
        if isinstance(values, list):
            names = [
                each.get("name", each.get("arch")) for each in values if isinstance(each, dict)
            ]
            if part not in names:
                return f" - it has items 0 to {len(values) - 1}"
            right = (*loc[:depth], names.index(part), *loc[depth + 1 :])
            return f" - did you mean {'.'.join(map(str, right))!r}?"
        values = values.get(part) if isinstance(values, dict) else None
    return ""


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
