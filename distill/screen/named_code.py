"""What a recipe would load that is not part of distill, for ``distill check``, which loads none of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.listing.extensions import BUILTIN, ExtensionKind, require
from distill.listing.outside_code import LIBRARIES, path_of
from distill.recipe.keys import FamilyRecipe, Recipe
from distill.recipe.types import is_custom


@dataclass(frozen=True)
class NamedCode:
    """A name of code in a recipe, and the file or folder of its module; None where it is not found."""

    key: str
    name: str
    path: Path | None

    @property
    def is_network(self) -> bool:
        """Whether it makes a student, without which there is no plan."""
        return is_custom(self.name)

    def describe(self) -> str:
        """Writes it as a line for people."""
        where = "a module that is not found from here" if self.path is None else str(self.path)
        if self.name.partition(":")[0] in LIBRARIES:
            where = "a network of that library"
        return f"not loaded: {self.key} = {self.name}, {where}"

    def to_json(self) -> dict[str, str | None]:
        """The same as plain data."""
        path = None if self.path is None else str(self.path)
        return {"key": self.key, "name": self.name, "path": path}


def code_named_by(recipe: Recipe) -> Iterator[NamedCode]:
    """Finds what a recipe would load that is not part of distill; loads nothing.

    Raises:
        RecipeError: the name of an extension is not known.
    """
    kinds = [(ExtensionKind.LAUNCHER, "engine.launcher", recipe.engine.launcher)]
    kinds += [(ExtensionKind.SINK, "engine.metric_sinks", s) for s in recipe.engine.metric_sinks]
    for index, source in enumerate(recipe.data.sources):
        kinds.append((ExtensionKind.SOURCE, f"data.sources.{index}.lister", source.lister or ""))
    if isinstance(recipe, FamilyRecipe):
        kinds += [
            (ExtensionKind.LOSS, "objective.extra", name) for name in recipe.objective.extra or ()
        ]
    sections = type(recipe.extensions).model_fields if recipe.extensions else ()
    kinds += [(ExtensionKind.KEYS, "extensions", name) for name in sections]
    for kind, key, name in kinds:
        if name not in ("", "auto", *BUILTIN[kind]):
            found = require(kind, name, key)
            yield NamedCode(key, name, path_of(found.value))
    for index, student in enumerate(recipe.students if isinstance(recipe, FamilyRecipe) else ()):
        if is_custom(student.arch):
            yield NamedCode(f"students.{index}.arch", student.arch, path_of(student.arch))
