"""The keys of both recipes as data: JSON Schema for editors, and the facts of one key."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.types import Loc, Section, facts_of, fields_of, section_in

Kinds = Mapping[str, type[FamilyRecipe] | type[TeacherRecipe]]
KINDS: Kinds = {
    "family": FamilyRecipe,
    "teacher": TeacherRecipe,
}
Reads = dict[tuple[type[Section], str], set[str]]  # modules that read a field of a section
MARK = "Written by distill"  # a file with it may be written again
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe, as ``distill explain`` prints it.

    ``name`` is dotted, without positions in lists; ``recipes`` are those that have it; ``default`` of
    a required key is the value that it has where its section is left out; ``used_in`` are the modules
    that read it.
    """

    name: str
    recipes: tuple[str, ...]
    meaning: str
    type: str
    is_required: bool
    default: Any
    role: str
    since: int
    used_in: tuple[str, ...]


def schema(kind: type[Section]) -> dict[str, Any]:
    """Returns the JSON Schema of a recipe; ``x-role`` of a key is *science* or *machine*."""
    found = _tidied(kind.model_json_schema(by_alias=True))
    facts = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"distill {_name_of(kind)} recipe",
        "$comment": f"{MARK}: `distill schema {_name_of(kind)}`.",
    }
    return {**facts, **found}


def schema_text(kind: type[Section]) -> str:
    """Returns the JSON Schema of a recipe as the text of a file."""
    return json.dumps(schema(kind), indent=2) + "\n"


def schema_name(kind: type[Section]) -> str:
    """Returns the name of the schema's file beside a recipe."""
    return f"{_name_of(kind)}.schema.json"


def keys(reads: Reads, kinds: Kinds = KINDS) -> dict[str, list[Key]]:
    """Returns all keys by dotted name; two entries where the recipes differ in it."""
    found: dict[str, list[Key]] = {}
    for recipe, kind in kinds.items():
        for key in _keys_below(kind, (), recipe, reads, None):
            same = found.setdefault(key.name, [])
            twin = next((other for other in same if _is_like(other, key)), None)
            if twin is None:
                same.append(key)
            else:
                both = (*twin.recipes, recipe)
                used = tuple(sorted({*twin.used_in, *key.used_in}))
                same[same.index(twin)] = Key(**{**vars(twin), "recipes": both, "used_in": used})
    return found


def declaring(kind: type[Section], name: str) -> type[Section]:
    """Returns the first class that has a field, of a section and those it inherits from."""
    bases = [base for base in kind.__mro__ if issubclass(base, Section)]
    return next(base for base in reversed(bases) if name in base.model_fields)


def _is_like(one: Key, other: Key) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("meaning", "type", "is_required", "default", "role")
    )


def _keys_below(
    kind: type[Section], loc: Loc, recipe: str, reads: Reads, defaults: Section | None
) -> Iterator[Key]:
    """Keys of a section; ``defaults`` is what the section is where a recipe leaves it out."""
    fragments = schema(kind) if not loc else kind.model_json_schema(by_alias=True)
    for (name, field), key in zip(kind.model_fields.items(), fields_of(kind), strict=True):
        facts, inner = facts_of(field), section_in(field.annotation)
        here = (*loc, key)
        given = None if field.is_required() else facts.default
        default = given if defaults is None else getattr(defaults, name)
        yield Key(
            ".".join(map(str, here)),
            (recipe,),
            field.description or "",
            _type_text(fragments["properties"][key]),
            field.is_required(),
            _plain(default),
            facts.role,
            facts.since,
            tuple(sorted(reads.get((declaring(kind, name), name), ()))),
        )
        if inner is not None:
            yield from _keys_below(
                inner, here, recipe, reads, default if isinstance(default, Section) else None
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    return list(value) if isinstance(value, tuple) else value


def _type_text(fragment: Mapping[str, Any]) -> str:
    """A type and what is allowed, in words."""
    if "$ref" in fragment or "allOf" in fragment:
        return "section"
    if "anyOf" in fragment:
        return " or ".join(dict.fromkeys(_type_text(part) for part in fragment["anyOf"]))
    if "const" in fragment or "enum" in fragment:
        values = fragment["enum"] if "enum" in fragment else [fragment["const"]]
        return " or ".join(f"`{value}`" for value in values)
    if fragment.get("type") == "array":
        parts = fragment.get("prefixItems")
        if parts:
            return f"list of {len(parts)} {_type_text(parts[0])}s"
        return f"list of: {_type_text(fragment['items'])}"
    names = {"object": "mapping", "string": "text", "boolean": "`true` or `false`"}
    limits = [f"{word} {fragment[key]:g}" for key, word in BOUNDS.items() if key in fragment]
    kind = str(fragment.get("type", "any value"))
    return ", ".join([names.get(kind, kind), *limits])


def _name_of(kind: type[Section]) -> str:
    return next(name for name, each in KINDS.items() if issubclass(kind, each))


def _tidied(node: Any) -> Any:
    """A part of pydantic's schema without titles, with the role of a key as ``x-role``."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    is_key = "role" in node and "was" in node
    tidy = {
        name: {key: _tidied(part) for key, part in value.items()}
        if name in ("properties", "$defs")
        else value
        if name == "default"
        else _tidied(value)
        for name, value in node.items()
        if name not in ("title", "since", "was", "role") or not (is_key or name == "title")
    }
    return {**tidy, "x-role": node["role"]} if is_key else tidy
