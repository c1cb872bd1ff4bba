"""A recipe as text: resolved, with the origin of every value, or copied to change."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from distill.errors import RecipeError
from distill.recipe.document import OVERRIDE, Document, find_recipe, read_document, with_overrides
from distill.recipe.keys import FamilyRecipe, Recipe
from distill.recipe.reader import load_recipe
from distill.recipe.types import Loc


def resolved_yaml(recipe: str, overrides: Sequence[str], loaded: Recipe) -> str:
    """The recipe with every default written out and, behind each value, where it came from.

    Keys that are null are left out: they do not apply.
    """
    document, _ = with_overrides(read_document(find_recipe(recipe)), overrides)
    dump = loaded.model_dump(mode="json", by_alias=True, exclude_none=True)
    stream = io.StringIO()
    YAML().dump(_commented(dump, (), document), stream)
    return stream.getvalue()


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


def copy_recipe(recipe: str, target: Path) -> list[Path]:
    """Copies a recipe to ``target``, and the teacher recipe it names beside it; returns both paths.

    Raises:
        RecipeError: another file is in the way; nothing was written.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(source)
    copies = {target: source}
    if isinstance(loaded, FamilyRecipe) and loaded.teacher.train is not None:
        copies[target.parent / loaded.teacher.train] = source.parent / loaded.teacher.train
    for path, original in copies.items():
        is_same = path != target and path.is_file() and path.read_text() == original.read_text()
        if path.exists() and not is_same:
            raise RecipeError(
                f"{path}: exists already", fix="Choose another name or folder; nothing was written."
            )
    for path, original in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(original.read_text())
    return list(copies)
