"""The hash of a recipe: what a checkpoint belongs to."""

import hashlib
import json
from typing import Any

from distill.recipe.types import Section


def recipe_hash(part: Section) -> str:
    """Twelve hex digits over the science keys of a recipe, or of a part of one."""
    values = _science_values(part)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _science_values(section: Section) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or extra["role"] != "science":
            continue
        values[name] = _plain(getattr(section, name))
    return values


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return _science_values(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
