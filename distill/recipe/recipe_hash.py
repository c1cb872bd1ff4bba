"""The hash of a recipe, which its checkpoints belong to.

Every science key of format 1 is in it. A key that came later is left out while it has the default that
it came with: runs from before know no such key, and their hash stays as it was.
"""

import hashlib
import json
from typing import Any

from distill.recipe.types import Section, facts_of


def recipe_hash(part: Section) -> str:
    """Twelve hex digits over the science keys of a recipe, or of a part of one."""
    values = _science_values(part)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _science_values(section: Section) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        facts, value = facts_of(field), getattr(section, name)
        if facts.role != "science":
            continue
        if facts.since > 1 and value == facts.introduced_default:
            continue
        values[name] = _plain(value)
    return values


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return _science_values(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
