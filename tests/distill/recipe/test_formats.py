"""What a later release does to recipes and runs of this one, shown with a toy recipe of two formats."""

from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator, Strict

from distill.errors import RecipeError
from distill.job.resolved_yaml import _without_null
from distill.listing.document import builtin_recipes
from distill.recipe import formats
from distill.recipe.formats import has_changed_since, with_defaults_of
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.reader import load_job
from distill.recipe.recipe_hash import recipe_hash
from distill.recipe.types import RECIPE_FORMAT, Section, facts_of, machine, science, size_mapping
from distill.screen.usage import _sections_below


class OldPart(Section):
    size: int = science(4, description="a size")
    rate: float = science(0.5, description="a rate")


class OldToy(Section):
    part: OldPart = science(OldPart(), description="a part")
    parts: Annotated[tuple[OldPart, ...], Strict(False)] = science((), description="parts")
    limit: int | None = science(None, description="a limit")


class NewPart(Section):
    """A changed default (rate), and a new key whose default changed once more (bias)."""

    size: int = science(4, description="a size")
    rate: float = science(0.9, was={1: 0.5}, description="a rate")
    bias: bool = science(True, since=2, was={2: False}, description="a bias")


class NewToy(Section):
    part: Annotated[NewPart, BeforeValidator(size_mapping)] = science(
        NewPart(), description="a part"
    )
    parts: Annotated[tuple[NewPart, ...], Strict(False)] = science((), description="parts")
    limit: int | None = science(7, was={1: None}, description="a limit")
    threads: int = machine(1, since=2, description="threads")


def read(values: dict[str, Any], format_number: int) -> NewToy:
    return NewToy.model_validate(with_defaults_of(format_number, NewToy, values))


@pytest.mark.parametrize(
    "values",
    [{}, {"part": {"size": 8}}, {"parts": [{"size": 8}, {"rate": 0.1}]}, {"limit": 3}],
)
def test_format__a_recipe_of_before_means_and_hashes_as_before(values: dict[str, Any]) -> None:
    old, new = OldToy.model_validate(values), read(values, 1)
    assert recipe_hash(new) == recipe_hash(old)
    assert new.part.rate == old.part.rate and new.limit == old.limit and not new.part.bias


def test_format__newer_recipes_have_the_newer_defaults() -> None:
    second, third = read({}, 2), read({}, 3)
    assert (second.part.rate, second.part.bias, second.limit) == (0.9, False, 7)
    assert third == NewToy() and third.part.bias
    assert recipe_hash(third) != recipe_hash(second) != recipe_hash(read({}, 1))


def test_recipe_hash__a_new_key_counts_once_it_is_used() -> None:
    before = recipe_hash(read({}, 1))
    assert recipe_hash(read({"part": {"bias": True}}, 1)) != before
    assert recipe_hash(read({"part": {"bias": False}}, 1)) == before
    assert recipe_hash(read({"threads": 8}, 1)) == before


def test_format__a_resolved_recipe_reads_back_whatever_format_it_had() -> None:
    for number in (1, 2, 3):
        for given in ({}, {"limit": None}, {"limit": 5}, {"parts": [{"size": 8}]}):
            toy = read(given, number)
            written = _without_null(toy, toy.model_dump(mode="json", by_alias=True), number)
            assert read(written, number) == toy


def test_format__given_values_stay() -> None:
    values = {"part": {"rate": 0.7, "bias": True, "size": 1}, "parts": [], "limit": 1}
    assert with_defaults_of(1, NewToy, values) == values
    assert has_changed_since(1, NewToy) and not has_changed_since(3, NewToy)


def test_science__a_new_key_needs_a_default_and_a_description() -> None:
    with pytest.raises(ValueError, match="a key that came in format 2 needs a default"):
        science(since=2, description="no default")
    with pytest.raises(TypeError, match="description"):
        science(1)  # type: ignore[call-arg]


def test_load_job__a_format_that_is_not_known_yet() -> None:
    with pytest.raises(RecipeError, match=r"format': 9: this distill knows formats 1 to "):
        load_job("quickstart", ["format=9"])
    with pytest.raises(RecipeError, match="format"):
        load_job("quickstart", ["format=0"])


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes__have_the_newest_format(name: str) -> None:
    assert load_job(name)[0].format == RECIPE_FORMAT


def test_formats__no_key_is_of_a_format_to_come() -> None:
    for kind in _sections_below([FamilyRecipe, TeacherRecipe]):
        for name, field in kind.model_fields.items():
            facts = facts_of(field)
            assert 1 <= facts.since <= RECIPE_FORMAT, name
            assert all(facts.since <= last < RECIPE_FORMAT for last in facts.was), name


def test_load_job__reads_with_the_defaults_of_the_recipes_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader asks for the format that the recipe names."""
    asked: list[int] = []

    def note(number: int, kind: type[Section], values: dict[str, Any]) -> dict[str, Any]:
        asked.append(number)
        return with_defaults_of(number, kind, values)

    monkeypatch.setattr("distill.recipe.reader.with_defaults_of", note)
    monkeypatch.setattr(formats, "RECIPE_FORMAT", 5)
    monkeypatch.setattr("distill.recipe.types.RECIPE_FORMAT", 5)
    load_job("quickstart", ["format=4"])
    assert asked == [4, RECIPE_FORMAT] and formats.format_of({}) == 1
