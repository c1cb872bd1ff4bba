"""The recipes that a run folder holds: resolved, so that a prepared job never reads the user's files again.

recipe.yaml             as given, for people
recipe.resolved.yaml    with overrides and defaults, paths absolute: what ranks, restarts and scoring read
teacher.resolved.yaml   the same of the recipe that ``teacher.train`` names
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from distill.job.resolved_yaml import resolved_yaml
from distill.listing.document import RESOLVED, RESOLVED_TEACHER, find_recipe
from distill.listing.source_paths import source_path
from distill.plan.teacher_source import with_teacher_stats
from distill.recipe.init_keys import LicenceSpec
from distill.recipe.inputs import DataSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.networks import ArchSpec
from distill.recipe.reader import TEACHER_PREFIX, load_job, teacher_recipe_of
from distill.recipe.types import BUILTIN_PHOTOGRAPHS
from distill.runfolder.files import replace_text
from distill.weights.initial import BESIDE, NO_HEADS

Network = TypeVar("Network", bound=ArchSpec)
Recipes = tuple[FamilyRecipe | TeacherRecipe, TeacherRecipe | None]


def load_from_here(
    recipe: str, overrides: Sequence[str], *, check_folders: bool = False
) -> Recipes:
    """Reads the user's recipes; relative paths become absolute from the folder that the command runs in.

    Images are normalised as a given teacher's files state, where the recipe does not.

    Raises:
        RecipeError: every problem of both files.
        CheckpointError: the recipe normalises otherwise than the teacher's files state.
    """
    loaded, teacher = load_job(recipe, overrides, check_folders=check_folders)
    if teacher is not None:
        theirs = {"data": _absolute_data(teacher.data), "model": _absolute_init(teacher.model)}
        teacher = teacher.model_copy(update=theirs)
    update: dict[str, Any] = {"data": _absolute_data(loaded.data)}
    if isinstance(loaded, TeacherRecipe):
        update["model"] = _absolute_init(loaded.model)
    else:
        update["students"] = tuple(map(_absolute_init, loaded.students))
        source = loaded.teacher
        paths: dict[str, Any] = {"weights": _absolute(source.weights)}
        paths["licence"] = _absolute_licence(source.licence)
        if source.heads_mode == "file":
            paths["heads"] = _absolute(source.heads)
        update["teacher"] = source.model_copy(update=paths)
    return with_teacher_stats(loaded.model_copy(update=update)), teacher


def read_recipes(run_folder: Path) -> Recipes:
    """Reads what ``write_recipes`` wrote, wherever the folder was moved to.

    Raises:
        RecipeError: a file is missing or is no recipe.
    """
    return load_job(str(run_folder / RESOLVED))


def write_recipes(
    run_folder: Path, recipe: str, overrides: Sequence[str], recipes: Recipes
) -> None:
    """Writes the recipe as given, and both as resolved; overrides only show where a value came from."""
    loaded, teacher = recipes
    source = find_recipe(recipe)
    of_family = [text for text in overrides if not text.startswith(TEACHER_PREFIX)]
    replace_text(run_folder / "recipe.yaml", source.read_text())
    if teacher is not None and isinstance(loaded, FamilyRecipe):
        path = teacher_recipe_of(source, str(loaded.teacher.train))
        theirs = [text.removeprefix(TEACHER_PREFIX) for text in overrides if text not in of_family]
        replace_text(run_folder / RESOLVED_TEACHER, resolved_yaml(str(path), theirs, teacher))
    replace_text(run_folder / RESOLVED, resolved_yaml(str(source), of_family, loaded))


def _absolute_data(data: DataSpec) -> DataSpec:
    sources = tuple(
        source
        if source.path == BUILTIN_PHOTOGRAPHS
        else source.model_copy(update={"path": _absolute(source.path)})
        for source in data.sources
    )
    return data.model_copy(update={"sources": sources, "index": _absolute(data.index)})


def _absolute_init(network: Network) -> Network:
    """A network whose initial weights are named by absolute paths."""
    init = network.init
    if init is None:
        return network
    heads = init.heads if init.heads in (NO_HEADS, BESIDE) else _absolute(init.heads)
    paths: dict[str, Any] = {"from_": _absolute(init.from_), "heads": heads}
    paths["licence"] = _absolute_licence(init.licence)
    return network.model_copy(update={"init": init.model_copy(update=paths)})


def _absolute_licence(licence: LicenceSpec | None) -> LicenceSpec | None:
    if licence is None or licence.file is None:
        return licence
    file = _absolute(str(Path(licence.file).expanduser()))
    return licence.model_copy(update={"file": file})


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(source_path(path))
