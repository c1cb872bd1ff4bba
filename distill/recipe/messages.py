"""Problems of a recipe as text: dotted name, value, what is allowed, with the line and a mark under it."""

import difflib
import json
import re
import typing
from collections.abc import Sequence
from typing import Any

from distill.errors import RecipeError
from distill.listing.document import KEY, MAX_RECIPE_BYTES, OVERRIDE, Document, Loc, Problem, marked
from distill.recipe.keys import TeacherRecipe
from distill.recipe.types import Section, all_keys, fields_of, section_at

LISTS = frozenset({"students", "stages", "sources"})  # keys whose value is a list of groups
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
        text = f"[{', '.join([_as_written(document, loc, value)] * count)}]"
        return f"{name} is a list: write {_assigned(document, loc, text)}"
    if isinstance(value, dict | list) and first["type"] != "dict_type":
        what = "list" if isinstance(value, list) else "group"
        inner = list(value.values() if isinstance(value, dict) else value)
        one = f": write {_assigned(document, loc, _text(inner[0]))}" if len(inner) == 1 else ""
        return f"{name} takes one value, not a {what}{one}"
    allowed = [str(entry["msg"]).removeprefix(EXPECTED) for entry in entries]
    is_plain = all(str(entry["msg"]).startswith(EXPECTED) for entry in entries)
    message = (EXPECTED if is_plain else "") + " or ".join(dict.fromkeys(allowed))
    return f"{message} (got {_text(value, quoted=True)}){_meant(first['type'], value)}"


def _length(annotation: Any) -> int:
    """Items of a tuple of fixed length within an annotation, else 1."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return 1 if Ellipsis in parts else len(parts)
    return max(map(_length, parts), default=1)


def _text(value: Any, *, quoted: bool = False) -> str:
    """A value as a recipe has it; a text stands in quotes where it is ``quoted``."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value) if quoted or not isinstance(value, str) else value


def _as_written(document: Document, loc: Loc, value: Any) -> str:
    """The value as the user wrote it, where that is one word."""
    if loc in document.overridden:
        return document.overridden[loc]
    line, column = document.marks.get(loc, (0, 0))
    word = re.match(r"[^\s,\]}#]+", document.lines[line][column:])
    is_word = loc in document.marks and not isinstance(value, dict | list | str) and word
    return word[0] if is_word and word else _text(value)


def _assigned(document: Document, loc: Loc, text: str) -> str:
    """How to give a key this value: as an override, or in the file."""
    is_file = not _is_overridden(loc, document)
    return f"{loc[-1]}: {text}" if is_file else f"{dotted(loc)}={text}"


def _in_group(kind: type[Section], loc: Loc, value: Any, document: Document) -> str:
    """How to write what was given for a group: at the one key that it must have, if it may be that key's."""
    section, _ = section_at(kind, loc)
    fields = {} if section is None else fields_of(section)
    needed = [key for key, field in fields.items() if field.is_required()]
    keys, text = ", ".join(fields), _as_written(document, loc, value)
    if len(needed) != 1 or value is None or isinstance(value, dict | list):
        return f"one of its keys below it, {keys}"
    is_list = typing.get_origin(fields[needed[0]].annotation) is tuple
    text = f"[{text}]" if is_list else text
    if _is_overridden(loc, document):
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


def path_of(key_path: Loc) -> str:
    """Writes a place as ``dotted`` does, in the first item of a list."""
    return ".".join(f"{part}.0" if part in LISTS else str(part) for part in key_path)


WORDS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}


def _meant(error_type: str, value: Any) -> str:
    """A guess at what was meant by a value of the wrong type; '' for none."""
    guess: object = None
    if error_type == "string_type" and isinstance(value, int | float):
        guess = f"'{_text(value)}', in quotes"
    elif error_type == "bool_type":
        guess = WORDS.get(str(value).lower())
    elif error_type in ("int_type", "float_type") and isinstance(value, str):
        guess = _number(value, is_int=error_type == "int_type")
    elif error_type == "int_type" and isinstance(value, float) and value.is_integer():
        guess = int(value)
    return "" if guess is None else f" - did you mean {guess}?"


def _number(text: str, *, is_int: bool) -> str | None:
    """The number that a text probably means: in quotes, with a unit, with a comma."""
    match = re.fullmatch(r"([+-]?[\d.,_ ]*\d(?:[eE][+-]?\d+)?) ?([kKmM%]?)", text.strip())
    if match is None:
        return None
    is_grouped = re.fullmatch(r"[1-9]\d{0,2}([, ]\d{3})+(\.\d+)?", match[1])
    plain = match[1].replace(",", "" if is_grouped or is_int else ".").replace(" ", "")
    try:
        number = float(plain) * {"k": 1e3, "m": 1e6, "%": 0.01}.get(match[2].lower(), 1.0)
    except ValueError:
        return None
    if is_int and not number.is_integer():
        return None
    shown = plain if not match[2] and not is_int else f"{int(number) if is_int else number:}"
    return f"{shown}, without quotes" if match[0] == match[1] == plain else shown


def dotted(loc: Loc) -> str:
    """Writes a place as a user does: ``students.0.lr``."""
    return ".".join(str(part) for part in loc if part != KEY)


def render(document: Document, problems: Sequence[Problem]) -> list[str]:
    """All problems of a file in its order, overrides last, each with its line and a mark."""
    placed: list[tuple[tuple[int, int], str]] = []
    for loc, message in problems:
        is_full = message.startswith(("unknown key", f"{dotted(loc)} "))
        what = message if is_full else f"{dotted(loc)}: {message}"
        if loc[:1] == (OVERRIDE,):
            placed.append(((MAX_RECIPE_BYTES, 0), f"override {loc[1]!r}: {message}"))
        elif _is_overridden(loc, document):
            text = f"override {dotted(loc)!r}: {message}"
            placed.append(((MAX_RECIPE_BYTES, 1), text))
        else:
            line, column = _position(loc, document)
            mark = marked(document.lines, line, column)
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
    known = (loc[:length] for length in range(len(loc), 0, -1) if loc[:length] in document.marks)
    key_path = next(known, None)
    return (0, 0) if key_path is None else document.marks[key_path]


def _is_overridden(loc: Loc, document: Document) -> bool:
    """The value at ``loc``, or its absence from the file, is an override's doing."""
    if any(loc[:length] in document.overridden for length in range(1, len(loc) + 1)):
        return True
    bare = tuple(part for part in loc if part != KEY)
    is_written = bare in document.marks
    return not is_written and any(key_path[: len(bare)] == bare for key_path in document.overridden)


def refuse(texts: Sequence[str]) -> None:
    """Raises a ``RecipeError`` with all texts; does nothing where there is none."""
    if texts:
        raise RecipeError("\n".join(texts), fix="Correct the lines above; nothing was started.")
