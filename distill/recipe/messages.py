"""Problems of a recipe as text: dotted name, value, what is allowed, with the line and a mark under it."""

import difflib
from collections.abc import Sequence
from typing import Any

from distill.errors import RecipeError
from distill.recipe.document import KEY, MAX_RECIPE_BYTES, OVERRIDE, Document
from distill.recipe.types import Loc, Problem, Section, all_keys, fields_of, section_at

EXPECTED = "Input should be "  # how pydantic begins; what follows is what is allowed


def place_of(kind: type[Section], entry: Any) -> Loc:
    """Finds the place in the file that one of pydantic's errors is about."""
    loc = tuple(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return (*loc, KEY)
    return loc if entry["type"] == "invalid_key" else section_at(kind, loc)[1]


def explain(kind: type[Section], loc: Loc, entries: Sequence[Any]) -> str:
    """The errors at one place as a sentence with the value and what is allowed."""
    first = entries[0]
    value = first["input"]
    if loc[-1] == KEY:
        return f"unknown key {dotted(loc)!r}{_similar_key(kind, loc[:-1])}"
    if first["type"] == "missing":
        return "is missing"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    allowed = [str(entry["msg"]).removeprefix(EXPECTED) for entry in entries]
    is_plain = all(str(entry["msg"]).startswith(EXPECTED) for entry in entries)
    message = (EXPECTED if is_plain else "") + " or ".join(dict.fromkeys(allowed))
    return f"{message} (got {value!r}){_meant(first['type'], value)}"


def _similar_key(kind: type[Section], loc: Loc) -> str:
    section, _ = section_at(kind, loc[:-1])
    known = [] if section is None else list(fields_of(section))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    marks = [key_path for key_path in all_keys(kind) if key_path[-1] == loc[-1]]
    elsewhere = sorted(marks, key=len)  # the least hidden one first
    if close or elsewhere:
        return f" - did you mean {close[0] if close else dotted(elsewhere[0])!r}?"
    return f" - known here: {', '.join(known)}"


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


def dotted(loc: Loc) -> str:
    """Writes a place as a user does: ``students.0.lr``."""
    return ".".join(str(part) for part in loc if part != KEY)


def render(document: Document, problems: Sequence[Problem]) -> list[str]:
    """All problems of a file in its order, overrides last, each with its line and a mark."""
    placed: list[tuple[tuple[int, int], str]] = []
    for loc, message in problems:
        what = message if message.startswith("unknown key") else f"{dotted(loc)}: {message}"
        if loc[:1] == (OVERRIDE,):
            placed.append(((MAX_RECIPE_BYTES, 0), f"override {loc[1]!r}: {message}"))
        elif _is_overridden(loc, document):
            placed.append(((MAX_RECIPE_BYTES, 1), f"override {dotted(loc)!r}: {message}"))
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
