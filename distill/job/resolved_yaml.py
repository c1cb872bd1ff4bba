"""A recipe as text: resolved, with the origin of every value."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from distill.listing.document import (
    OVERRIDE,
    Document,
    Loc,
    find_recipe,
    read_document,
    with_overrides,
)
from distill.recipe.keys import Recipe
from distill.recipe.types import Section, facts_of


def resolved_yaml(recipe: str, overrides: Sequence[str], loaded: Recipe) -> str:
    """The recipe with every default written out and, behind each value, where it came from.

    Keys that are null by default are left out while they are: they do not apply.
    """
    document, _ = with_overrides(read_document(find_recipe(recipe)), overrides)
    dump = _without_null(loaded, loaded.model_dump(mode="json", by_alias=True), loaded.format)
    stream = io.StringIO()
    YAML().dump(_commented(dump, (), document), stream)
    return stream.getvalue()


def _without_null(
    section: Section, values: Mapping[str, Any], format_number: int
) -> dict[str, Any]:
    """The values of a section without the keys that are null by default in its format, and are null."""
    written: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        key, held = field.alias or name, getattr(section, name)
        value = values[key]
        if value is None and facts_of(field).default_at(format_number) is None:
            continue
        if isinstance(held, Section):
            value = _without_null(held, value, format_number)
            if not value:  # nothing but such keys
                continue
        elif isinstance(held, tuple):
            value = [
                _without_null(item, each, format_number) if isinstance(item, Section) else each
                for item, each in zip(held, value, strict=True)
            ]
        written[key] = value
    return written


def _commented(value: Any, loc: Loc, document: Document) -> Any:
    if isinstance(value, dict):
        node = CommentedMap()
        for key, entry in value.items():
            here = (*loc, key)
            node[key] = _commented(entry, here, document)
            is_flow = isinstance(entry, list) and node[key].fa.flow_style()
            if is_flow or not isinstance(entry, dict | list):
                node.yaml_add_eol_comment(_origin(here, document), key)
        return node
    if isinstance(value, list):
        items = CommentedSeq(_commented(item, (*loc, i), document) for i, item in enumerate(value))
        if not any(isinstance(item, dict | list) for item in value):
            items.fa.set_flow_style()
        return items
    return value


def _origin(loc: Loc, document: Document) -> str:
    node: Any = document.values
    for key in loc:
        is_there = key in node if isinstance(node, dict) else isinstance(node, list)
        if not is_there:
            return "default"
        node = node[key]
    touched = any(loc[:length] in document.overridden for length in range(1, len(loc) + 1))
    return OVERRIDE if touched else "recipe"
