"""What the keys of a recipe are made of: roles, sections, checked types.

Each key is marked *science* (it decides the result) or *machine* (where and how fast). Imports no
torch, so that the command line starts fast.
"""

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

from students.shapes import CATALOG

ARCHITECTURES = tuple(CATALOG)
FREE_SIZES = ("vit", "convnext")
BUILTIN_PHOTOGRAPHS = "builtin:photographs"
Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]


def science(default: Any = ..., **constraints: Any) -> Any:
    """A key that decides the result."""
    return Field(default, json_schema_extra={"role": "science"}, **constraints)


def machine(default: Any = ..., **constraints: Any) -> Any:
    """A key about where and how fast, with no influence on the result."""
    return Field(default, json_schema_extra={"role": "machine"}, **constraints)


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def is_custom(arch: str) -> bool:
    """A network from outside: ``package.module:factory``, ``transformers:NAME`` or ``timm:NAME``."""
    return ":" in arch


def _known_arch(name: str) -> str:
    if name in ARCHITECTURES or name in FREE_SIZES:
        return name
    if is_custom(name):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[\w./-]+", name):
            return name
        raise ValueError(f"{name!r}: write package.module:factory, transformers:NAME or timm:NAME")
    close = difflib.get_close_matches(name, [*ARCHITECTURES, *FREE_SIZES], n=1)
    hint = (
        f" - did you mean {close[0]!r}?"
        if close
        else f"; known: {', '.join([*ARCHITECTURES, *FREE_SIZES])}"
    )
    raise ValueError(f"{name!r} is not known{hint}")


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(f"{name!r}: use letters, digits, '-', '_' and '.', at most 64 of them")
    return name


def _duration(value: object) -> object:
    """The value itself if it is a duration such as ``30min`` or ``2h``, or a number of steps."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", value)
        if match is None:
            raise ValueError(
                f"{value!r}: write a duration such as '30min', '90s' or '2h', or a number of steps"
            )
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{value!r}: write a duration such as '30min', or a number of steps, at least 1"
        )
    return value


def rank_range(text: str) -> range:
    """The ranks that ``FIRST-LAST`` names; both ends belong.

    Raises:
        ValueError: the text is something else.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"{text!r}: write a number of ranks, FIRST-LAST such as '8-15', or auto")
    return range(int(match[1]), int(match[2]) + 1)


def ranks_or_range(value: int | str) -> int | str:
    """Checks that a value is a number of ranks, ``FIRST-LAST`` or ``auto``."""
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"{value}: at least 1, or auto")
    elif value != "auto":
        rank_range(value)
    return value


def size_mapping(value: object) -> object:
    """Writes the shorthand ``64`` out as ``{size: 64}``."""
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


def arch_mapping(value: object) -> object:
    """Writes the shorthand ``vits16`` out as ``{arch: vits16}``."""
    return {"arch": value} if isinstance(value, str) else value


def _catalogue_name(name: str) -> str:
    if name in FREE_SIZES:
        raise ValueError(
            f"{name!r}: a catalogue name, or leave it out: it is read from the weights"
        )
    return _known_arch(name)


def source_mapping(value: object) -> object:
    """Writes the shorthand ``FOLDER`` out as ``{path: FOLDER}``."""
    return {"path": value} if isinstance(value, str) else value


Arch = Annotated[str, AfterValidator(_known_arch)]
CatalogueName = Annotated[str, AfterValidator(_catalogue_name)]
Name = Annotated[str, AfterValidator(_safe_name)]
Pair = Annotated[tuple[float, float], Strict(False)]
Triple = Annotated[tuple[float, float, float], Strict(False)]
Ints = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)]
Every = Annotated[int | str, AfterValidator(_duration)]


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the key that a recipe writes."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """The section class within an annotation: itself, optional, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_in(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


def section_at(kind: type[Section], loc: Loc) -> tuple[type[Section] | None, Loc]:
    """The section at ``loc`` (None: a value is there), and ``loc`` without pydantic's marks."""
    section: type[Section] | None = kind
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            continue
        if section is None or part not in fields_of(section):
            return section, loc[:depth]
        section = section_in(fields_of(section)[part].annotation)
    return section, loc


def all_keys(kind: type[Section], loc: Loc = ()) -> Iterator[Loc]:
    """The place of every key at and below ``loc``, without list positions."""
    for key, field in fields_of(kind).items():
        yield (*loc, key)
        section = section_in(field.annotation)
        if section is not None:
            yield from all_keys(section, (*loc, key))
