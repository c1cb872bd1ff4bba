"""Defaults of earlier recipe formats, so that an upgrade never changes what a recipe means."""

from collections.abc import Mapping
from typing import Any

from distill.recipe.types import RECIPE_FORMAT, Section, facts_of, fields_of, section_in


def format_of(values: Mapping[str, Any]) -> int:
    """Returns the format of a recipe's raw values: 1 where none is written, the newest where it is wrong."""
    number = values.get("format", 1)
    return number if isinstance(number, int) and 1 <= number <= RECIPE_FORMAT else RECIPE_FORMAT


def with_defaults_of(
    format_number: int, kind: type[Section], values: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Writes every default that has changed since a format into raw values that do not give the key."""
    full = dict(values)
    for key, field in fields_of(kind).items():
        facts, section = facts_of(field), section_in(field.annotation)
        default = facts.default_at(format_number)
        if key not in full and not field.is_required():
            if isinstance(default, Section) and has_changed_since(format_number, type(default)):
                full[key] = default.model_dump(by_alias=True, exclude_unset=True)
            elif default != facts.default:
                full[key] = default
        value = full.get(key)
        if section is not None and isinstance(value, dict):
            full[key] = with_defaults_of(format_number, section, value)
        elif section is not None and isinstance(value, list):
            full[key] = [
                with_defaults_of(format_number, section, item) if isinstance(item, dict) else item
                for item in value
            ]
    return full


def has_changed_since(format_number: int, kind: type[Section]) -> bool:
    """Whether a default in a section, or below it, is another one than in a format."""
    for field in kind.model_fields.values():
        facts, section = facts_of(field), section_in(field.annotation)
        if facts.default_at(format_number) != facts.default:
            return True
        if section is not None and has_changed_since(format_number, section):
            return True
    return False
