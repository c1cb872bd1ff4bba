"""The keys of both recipes as data: the facts of each, in words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.listing.document import Loc
from distill.recipe.json_schema import KINDS, Kinds, schema
from distill.recipe.types import Section, facts_of, fields_of, section_in

Reads = dict[tuple[type[Section], str], set[str]]  # modules that read a field of a section
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
