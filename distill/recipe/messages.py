"""What is wrong with a recipe's keys as a sentence: the value, what is allowed, what was probably meant."""

import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

from distill.listing.document import KEY, Document, Loc
from distill.listing.problem_text import (
    LISTS,
    as_text,
    as_written,
    assigned,
    dotted,
    is_overridden,
    meant,
    path_of,
)
from distill.recipe.keys import TeacherRecipe
from distill.recipe.types import Section, all_keys, fields_of, section_at

EXPECTED = "Input should be "  # how pydantic begins; what follows is what is allowed


def place_of(kind: type[Section], entry: Any) -> Loc:
    """Finds the place in the file that one of pydantic's errors is about."""
    loc = tuple(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return (*loc, KEY)
    return loc if entry["type"] == "invalid_key" else section_at(kind, loc)[1]


def explain(kind: type[Section], loc: Loc, entries: Sequence[Any], document: Document) -> str:
    """The errors at one place as a sentence with the value and what is allowed."""
    first = entries[0]
    value, name = first["input"], dotted(loc)
    if loc[-1] == KEY:
        return f"unknown key {name!r}{_similar_key(kind, loc[:-1])}"
    if first["type"] == "missing":
        return "is missing"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "too_short":
        return f"{name} is empty: give one at least"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{name} is a group: write {_in_group(kind, loc, value, document)}"
    if first["type"] == "tuple_type":
        section, _ = section_at(kind, loc[:-1])
        count = 1 if section is None else _length(fields_of(section)[str(loc[-1])].annotation)
        text = f"[{', '.join([as_written(document, loc, value)] * count)}]"
        return f"{name} is a list: write {assigned(document, loc, text)}"
    if isinstance(value, dict | list) and first["type"] != "dict_type":
        what = "list" if isinstance(value, list) else "group"
        inner = list(value.values() if isinstance(value, dict) else value)
        one = f": write {assigned(document, loc, as_text(inner[0]))}" if len(inner) == 1 else ""
        return f"{name} takes one value, not a {what}{one}"
    allowed = [str(entry["msg"]).removeprefix(EXPECTED) for entry in entries]
    is_plain = all(str(entry["msg"]).startswith(EXPECTED) for entry in entries)
    message = (EXPECTED if is_plain else "") + " or ".join(dict.fromkeys(allowed))
    return f"{message} (got {as_text(value, quoted=True)}){meant(first['type'], value)}"


def _length(annotation: Any) -> int:
    """Items of a tuple of fixed length within an annotation, else 1."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return 1 if Ellipsis in parts else len(parts)
    return max(map(_length, parts), default=1)


def _in_group(kind: type[Section], loc: Loc, value: Any, document: Document) -> str:
    """How to write what was given for a group: at the one key that it must have, if it may be that key's."""
    section, _ = section_at(kind, loc)
    fields = {} if section is None else fields_of(section)
    needed = [key for key, field in fields.items() if field.is_required()]
    keys, text = ", ".join(fields), as_written(document, loc, value)
    if len(needed) != 1 or value is None or isinstance(value, dict | list):
        return f"one of its keys below it, {keys}"
    is_list = typing.get_origin(fields[needed[0]].annotation) is tuple
    text = f"[{text}]" if is_list else text
    if is_overridden(loc, document):
        return f"{dotted(loc)}.{needed[0]}={text}; its keys: {keys}"
    return f"{loc[-1]}: {{{needed[0]}: {text}}}; its keys: {keys}"


def resembled(kind: type[Section], loc: Loc) -> Loc | None:
    """The known key beside an unknown one at ``loc`` that was probably meant."""
    section, _ = section_at(kind, loc[:-1])
    known = [] if section is None else list(fields_of(section))
    close = difflib.get_close_matches(str(loc[-1]).strip(), known, n=1)
    return (*loc[:-1], close[0]) if close else None


def _similar_key(kind: type[Section], loc: Loc) -> str:
    key = str(loc[-1])
    if re.search(r"\w:\S", key):
        return " - a space is missing after the colon"
    if key != key.strip() or "\xa0" in key:
        return " - it has a space that is not the space key's"
    section, _ = section_at(kind, loc[:-1])
    elsewhere = [each for each in all_keys(kind) if each[-1] == key]
    ranks = {each: (not LISTS.isdisjoint(each), len(each)) for each in elsewhere}
    nearest = [each for each in elsewhere if ranks[each] == min(ranks.values())]
    close = resembled(kind, loc)
    names = [path_of(each) for each in nearest] or ([str(close[-1])] if close else [])
    if names:
        return f" - did you mean {' or '.join(map(repr, names))}?"
    if any((*loc[:-1], key) == each for each in all_keys(TeacherRecipe)):
        return f" - a key of the teacher's recipe: teacher:{dotted(loc)}"
    return f" - known here: {', '.join([] if section is None else fields_of(section))}"
