"""JSON Schema of both recipes, for editors."""

import json
from collections.abc import Mapping
from typing import Any

from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.types import Section

Kinds = Mapping[str, type[FamilyRecipe] | type[TeacherRecipe]]
KINDS: Kinds = {
    "family": FamilyRecipe,
    "teacher": TeacherRecipe,
}
MARK = "Written by distill"  # a file with it may be written again


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
