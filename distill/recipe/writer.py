"""A recipe as text: resolved, with the origin of every value, or copied to change."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from distill.errors import RecipeError
from distill.recipe.document import OVERRIDE, Document, find_recipe, read_document, with_overrides
from distill.recipe.keys import FamilyRecipe, Recipe, TeacherRecipe
from distill.recipe.reader import load_recipe, teacher_recipe_of
from distill.recipe.schema import MARK, schema_name, schema_text
from distill.recipe.types import Loc, Section, facts_of
from distill.runfolder.files import make_folder, replace_text

EDITOR_LINE = "# yaml-language-server: $schema="  # read by the YAML language server, in any editor


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


def copy_recipe(recipe: str, target: Path) -> list[Path]:
    """Copies a recipe to ``target``, and beside it the teacher recipe that it names and their JSON Schemas.

    Returns every path.

    Raises:
        RecipeError: another file is in the way; nothing was written.
    """
    source = find_recipe(recipe)
    loaded = load_recipe(source)
    copies = {target: source}
    if isinstance(loaded, FamilyRecipe) and loaded.teacher.train is not None:
        train = loaded.teacher.train
        copies[target.parent / train] = teacher_recipe_of(source, train)
    kinds = {path: type(loaded) if path == target else TeacherRecipe for path in copies}
    texts = {path: _for_editors(original, kinds[path]) for path, original in copies.items()}
    for kind in dict.fromkeys(kinds.values()):
        texts[target.parent / schema_name(kind)] = schema_text(kind)
    for path, text in texts.items():
        is_same = path != target and path.is_file() and path.read_text() == text
        is_older_schema = path not in copies and path.is_file() and MARK in path.read_text()
        if path.exists() and not is_same and not is_older_schema:
            raise RecipeError(
                f"{path}: exists already", fix="Choose another name or folder; nothing was written."
            )
    for path, text in texts.items():
        make_folder(path.parent)
        replace_text(path, text)
    return list(texts)


def _for_editors(original: Path, kind: type[Recipe]) -> str:
    """A recipe's text with the line that names its schema to editors, which lies beside it."""
    text = original.read_text()
    if text.startswith(EDITOR_LINE):
        text = text.partition("\n")[2]
    return f"{EDITOR_LINE}{schema_name(kind)}\n{text}"
