"""Places, values and problems of a document as text: dotted names, values as written, each problem with its line and a mark under it."""

import json
import re
from collections.abc import Sequence
from typing import Any

from distill.errors import RecipeError
from distill.listing.document import KEY, MAX_RECIPE_BYTES, OVERRIDE, Document, Loc, Problem, marked

LISTS = frozenset({"students", "stages", "sources"})  # keys whose value is a list of groups


def as_text(value: Any, *, quoted: bool = False) -> str:
    """A value as a recipe has it; a text stands in quotes where it is ``quoted``."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_text, value)) + "]"
    return repr(value) if quoted or not isinstance(value, str) else value


def as_written(document: Document, loc: Loc, value: Any) -> str:
    """The value as the user wrote it, where that is one word."""
    if loc in document.overridden:
        return document.overridden[loc]
    line, column = document.marks.get(loc, (0, 0))
    word = re.match(r"[^\s,\]}#]+", document.lines[line][column:])
    is_word = loc in document.marks and not isinstance(value, dict | list | str) and word
    return word[0] if is_word and word else as_text(value)


def assigned(document: Document, loc: Loc, text: str) -> str:
    """How to give a key this value: as an override, or in the file."""
    is_file = not is_overridden(loc, document)
    return f"{loc[-1]}: {text}" if is_file else f"{dotted(loc)}={text}"


WORDS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}


def meant(error_type: str, value: Any) -> str:
    """A guess at what was meant by a value of the wrong type; '' for none."""
    guess: object = None
    if error_type == "string_type" and isinstance(value, int | float):
        guess = f"'{as_text(value)}', in quotes"
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


def path_of(key_path: Loc) -> str:
    """Writes a place as ``dotted`` does, in the first item of a list."""
    return ".".join(f"{part}.0" if part in LISTS else str(part) for part in key_path)


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
        elif is_overridden(loc, document):
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


def is_overridden(loc: Loc, document: Document) -> bool:
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
