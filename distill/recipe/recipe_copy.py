"""A copy of a recipe to change, with what it needs beside it."""

from pathlib import Path

from distill.errors import RecipeError
from distill.listing.document import find_recipe
from distill.recipe.json_schema import MARK, schema_name, schema_text
from distill.recipe.keys import FamilyRecipe, Recipe, TeacherRecipe
from distill.recipe.reader import load_recipe, teacher_recipe_of
from distill.runfolder.files import make_folder, replace_text

EDITOR_LINE = "# yaml-language-server: $schema="  # read by the YAML language server, in any editor


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
