"""What the keys of a recipe are made of: roles, sections, checked types.

Each key is marked *science* (it decides the result) or *machine* (where and how fast). Imports no
torch, so that the command line starts fast.
"""

import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo

from distill.listing.document import Loc
from students.shapes import CATALOG, FACTORY

ARCHITECTURES = tuple(CATALOG)
FREE_SIZES = ("vit", "convnext")
LARGEST_INT = 2**63 - 1  # a plan multiplies up to ten numbers of a recipe, and floats end at 1e308
LARGEST_FLOAT = 1e30
RECIPE_FORMAT = 3  # the newest; a release that adds a key or changes a default has the next
BUILTIN_PHOTOGRAPHS = "builtin:photographs"


def science(
    default: Any = ...,
    *,
    description: str,
    since: int = 1,
    was: Mapping[int, Any] | None = None,
    **constraints: Any,
) -> Any:
    """Declares a key that decides the result.

    Args:
        default: of the newest format; left out where the key must be given.
        description: meaning, unit and the default's reason, for ``distill explain``.
        since: the recipe format in which the key came.
        was: earlier defaults, each by the last format that had it.
        **constraints: of pydantic's ``Field``.

    Raises:
        ValueError: a key that came after format 1 has no default, so that older recipes lack it.
    """
    return _key("science", default, description, since, was or {}, constraints)


def machine(
    default: Any = ...,
    *,
    description: str,
    since: int = 1,
    was: Mapping[int, Any] | None = None,
    **constraints: Any,
) -> Any:
    """Declares a key about where and how fast, with no influence on the result; arguments as for ``science``."""
    return _key("machine", default, description, since, was or {}, constraints)


def _key(
    role: str,
    default: Any,
    description: str,
    since: int,
    was: Mapping[int, Any],
    constraints: Mapping[str, Any],
) -> Any:
    if since > 1 and default is ...:
        raise ValueError(f"a key that came in format {since} needs a default for older recipes")
    extra: Any = {"role": role, "since": since, "was": dict(was)}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


@dataclass(frozen=True)
class KeyFacts:
    """What is declared of a key beside its type: role, first format, earlier defaults."""

    role: Literal["science", "machine"]
    since: int
    was: Mapping[int, Any]
    default: Any

    def default_at(self, format_number: int) -> Any:
        """Returns the default that recipes of a format have."""
        return next(
            (self.was[last] for last in sorted(self.was) if format_number <= last), self.default
        )

    @property
    def introduced_default(self) -> Any:
        """The default that the key came with."""
        return self.default_at(self.since)


def facts_of(field: FieldInfo) -> KeyFacts:
    """Returns what ``science`` or ``machine`` declared of a field."""
    extra: Any = field.json_schema_extra
    return KeyFacts(extra["role"], extra["since"], extra["was"], field.default)


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_bounded(cls, value: Any) -> Any:
        """Refuses numbers that no plan can be computed with."""
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int) and abs(each) > LARGEST_INT:
                raise ValueError(
                    f"a number of about {_num_digits(each)} digits: at most {LARGEST_INT:,} is allowed"
                )
            if isinstance(each, float) and abs(each) > LARGEST_FLOAT:
                raise ValueError(f"{each}: at most {LARGEST_FLOAT:g} is allowed")
        return value


def _num_digits(number: int) -> int:
    """Digits of a number that may be too long to be written out."""
    return int((abs(number).bit_length() - 1) * math.log10(2)) + 1


def is_custom(arch: str) -> bool:
    """A network from outside: ``package.module:factory``, ``transformers:NAME`` or ``timm:NAME``."""
    return ":" in arch


def _known_arch(name: str) -> str:
    if name in ARCHITECTURES or name in FREE_SIZES:
        return name
    if is_custom(name):
        if FACTORY.fullmatch(name):
            return name
        raise ValueError(f"{name!r}: write package.module:factory, transformers:NAME or timm:NAME")
    close = difflib.get_close_matches(name, [*ARCHITECTURES, *FREE_SIZES], n=1)
    hint = (
        f" - did you mean {close[0]!r}?"
        if close
        else f"; known: {', '.join([*ARCHITECTURES, *FREE_SIZES])}"
    )
    raise ValueError(f"{name!r} is not known{hint}")


def _known_format(number: int) -> int:
    if number > RECIPE_FORMAT:
        raise ValueError(f"{number}: this distill knows formats 1 to {RECIPE_FORMAT}; upgrade it")
    return number


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
        if float(match[1]) > LARGEST_FLOAT:
            raise ValueError(f"a duration of {len(match[1])} digits: write one such as '30min'")
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
    if match is None or len(text) > 40 or int(match[1]) > int(match[2]):
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


_NAMES: Any = {"enum": [*ARCHITECTURES, *FREE_SIZES]}
Arch = Annotated[
    str,
    AfterValidator(_known_arch),
    WithJsonSchema({"anyOf": [_NAMES, {"type": "string", "pattern": ":"}]}),
]
Format = Annotated[int, Field(ge=1), AfterValidator(_known_format)]
CatalogueName = Annotated[
    str, AfterValidator(_catalogue_name), WithJsonSchema({"enum": list(ARCHITECTURES)})
]
Name = Annotated[str, AfterValidator(_safe_name)]
Pair = Annotated[tuple[float, float], Strict(False)]
Triple = Annotated[tuple[float, float, float], Strict(False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Probabilities = Annotated[tuple[Probability, Probability, Probability], Strict(False)]
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
