import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.listing.document import RESOLVED, builtin_recipes
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.recipe.recipe_hash import recipe_hash
from distill.recipe.types import Section, facts_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
STORED = json.loads((FIXTURES / "recipe-hashes-0.1.0.json").read_text())
RENAMED = {"family_published"}


def sections(part: Section) -> Iterator[tuple[str, Section]]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name) if facts_of(field).since == 1 else None
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for index, item in items:
            if isinstance(item, Section):
                yield name if index is None else f"{name}.{index}", item


def hashes(name: str) -> dict[str, str]:
    before = FIXTURES / "recipes-0.1.0" / name / RESOLVED  # of recipes that say something else now
    recipe, teacher = load_job(str(before) if before.is_file() else name)
    found = {"": recipe_hash(recipe)}
    if isinstance(recipe, FamilyRecipe):
        found["shared"] = recipe_hash(recipe.model_copy(update={"students": ()}))
    found |= {place: recipe_hash(section) for place, section in sections(recipe)}
    return found if teacher is None else {**found, "teacher:": recipe_hash(teacher)}


@pytest.mark.parametrize("name", STORED)
def test_recipe_hash__is_that_of_0_1_0(name: str) -> None:
    """A changed hash makes every run folder of 0.1.0 foreign to its own recipe."""
    assert hashes(name) == STORED[name]


def test_recipe_hash__every_built_in_recipe_of_0_1_0_is_still_there() -> None:
    assert STORED.keys() - RENAMED <= builtin_recipes().keys()
