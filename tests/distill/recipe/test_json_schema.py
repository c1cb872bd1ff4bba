import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from distill.listing.document import builtin_recipes
from distill.recipe.json_schema import schema
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.recipe_copy import EDITOR_LINE
from distill.screen.key_text import markdown
from distill.screen.keys import keys
from distill.screen.usage import _sections_below
from tests.support.command import Run

PAGE = Path(__file__).parents[3] / "docs/recipe-keys.md"
RECIPES = sorted(builtin_recipes().items())
TYPES: dict[str, Any] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def faults(value: Any, part: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a value by a JSON Schema; a keyword that is not known here is an error."""
    for keyword, rule in part.items():
        match keyword:
            case "$ref":
                yield from faults(value, defs[rule.rpartition("/")[2]], defs)
            case "anyOf":
                if all(list(faults(value, each, defs)) for each in rule):
                    yield f"{value!r} is none of {rule}"
            case "type":
                is_bool = isinstance(value, bool) and rule != "boolean"
                if is_bool or not isinstance(value, TYPES[rule]):
                    yield f"{value!r} is no {rule}"
            case "enum" if value not in rule:
                yield f"{value!r} is not in {rule}"
            case "const" if value != rule:
                yield f"{value!r} is not {rule}"
            case "pattern" if isinstance(value, str) and not re.search(rule, value):
                yield f"{value!r} does not match {rule}"
            case "minimum" if isinstance(value, (int, float)) and value < rule:
                yield f"{value} < {rule}"
            case "maximum" if isinstance(value, (int, float)) and value > rule:
                yield f"{value} > {rule}"
            case "exclusiveMinimum" if isinstance(value, (int, float)) and value <= rule:
                yield f"{value} <= {rule}"
            case "exclusiveMaximum" if isinstance(value, (int, float)) and value >= rule:
                yield f"{value} >= {rule}"
            case "multipleOf" if isinstance(value, (int, float)) and value % rule:
                yield f"{value} % {rule}"
            case "required":
                if isinstance(value, dict):
                    yield from (f"{key} is missing" for key in rule if key not in value)
            case "properties" if isinstance(value, dict):
                for key in value.keys() & rule.keys():
                    yield from faults(value[key], rule[key], defs)
            case "additionalProperties" if rule is False and isinstance(value, dict):
                yield from (f"unknown {key}" for key in value if key not in part["properties"])
            case "items" if isinstance(value, list):
                yield from (fault for item in value for fault in faults(item, rule, defs))
            case "prefixItems" if isinstance(value, list):
                for item, each in zip(value, rule, strict=False):
                    yield from faults(item, each, defs)
            case "minItems" | "minLength" if isinstance(value, (list, str)) and len(value) < rule:
                yield f"{value!r} is shorter than {rule}"
            case "maxItems" | "maxLength" if isinstance(value, (list, str)) and len(value) > rule:
                yield f"{value!r} is longer than {rule}"
            case _:
                assert keyword in KEYWORDS, keyword


KEYWORDS = {
    *("$ref", "anyOf", "type", "enum", "const", "pattern", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "required", "properties"),
    *("additionalProperties", "items", "prefixItems", "minItems", "maxItems", "minLength"),
    *("maxLength", "description", "default", "x-role", "title", "$defs", "$schema", "$comment"),
}


def check(values: dict[str, Any]) -> list[str]:
    rules = schema(FamilyRecipe if "students" in values else TeacherRecipe)
    found = rules["properties"].keys() & values.keys()
    top = {key: rule for key, rule in rules.items() if key not in ("properties", "type")}
    listed = [fault for key in found for fault in
              faults(values[key], rules["properties"][key], rules["$defs"])]  # fmt: skip
    return listed + list(faults(values, {**top, "properties": rules["properties"]}, rules["$defs"]))


@pytest.mark.parametrize(("name", "path"), RECIPES, ids=[name for name, _ in RECIPES])
def test_schema__editors_find_no_fault_in_a_built_in_recipe(name: str, path: Path) -> None:
    assert check(YAML(typ="safe").load(path.read_text())) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("shedule",), {}),
        (("schedule", "ema"), 1.5),
        (("schedule", "ema"), "0.9"),
        (("schedule", "bacth"), 8),
        (("crops", "flip"), -0.1),
        (("engine", "zero"), 4),
        (("engine", "micro_batch"), 24),
        (("students", 0, "arch"), "vits17"),
        (("data", "sources"), []),
    ],
)
def test_schema__editors_find_each_fault(place: tuple[str | int, ...], value: Any) -> None:
    values = YAML(typ="safe").load(builtin_recipes()["quickstart"].read_text())
    holder = values
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = value
    assert check(values) != []


def test_schema__shorthands_are_allowed() -> None:
    values = YAML(typ="safe").load(builtin_recipes()["quickstart"].read_text())
    values["crops"]["global"] = 64
    values["data"]["sources"] = ["folder"]
    values["students"] = ["vits16", "timm:resnet50"]
    assert check(values) == []
    values["students"] = ["vits17"]
    assert check(values) != []


@pytest.mark.parametrize(
    "kind", sorted(_sections_below([FamilyRecipe, TeacherRecipe]), key=lambda kind: kind.__name__)
)
def test_descriptions__are_one_or_two_sentences(kind: Any) -> None:
    for name, field in kind.model_fields.items():
        text = field.description
        assert text and text[0].isupper() | (text[0] == "`") and text.endswith("."), name
        assert 10 < len(text) <= 200 and text.count(". ") <= 1, f"{name}: {text}"
        if not field.is_required() and field.default is None:
            assert "Null" in text, f"{name}: what does null mean?"


def test_recipe_keys_page__is_the_one_that_is_generated() -> None:
    """``distill schema --markdown > docs/recipe-keys.md`` writes it again."""
    assert PAGE.read_text() == markdown()


def test_keys__have_a_row_for_every_key_of_both_recipes() -> None:
    listed = keys({})
    assert {"schedule.ema", "students.lr", "stages.gram.weight", "crops.global.size"} <= set(listed)
    assert listed["schedule.ema"][0].recipes == ("family", "teacher")
    assert listed["heads.dino.hidden"][0].default == 8192


def test_schema_command__prints_json_schema_and_nothing_else(distill: Run) -> None:
    for words, title in (((), "family"), (("teacher",), "teacher")):
        ended = distill("schema", *words)
        assert ended.code == 0
        assert json.loads(ended.out)["title"] == f"distill {title} recipe"
    ended = distill("schema", "famly")
    assert ended.code == 2 and "famly: no kind of recipe" in ended.err


def test_explain_command__one_key(distill: Run) -> None:
    ended = distill("explain", "schedule.ema")
    assert ended.code == 0
    for words in ("Momentum per step", "number, at least 0, at most 1", "0.994", "science",
                  "family and teacher", "distill/job/family.py"):  # fmt: skip
        assert words in ended.out
    found = json.loads(distill("explain", "students.0.lr", "--json").out)
    assert found["key"] == "students.lr" and found["entries"][0]["role"] == "science"
    ended = distill("explain", "schedule.eam")
    assert ended.code == 2 and "did you mean 'schedule.ema'?" in ended.err
    assert "did you mean 'crops.flip'?" in distill("explain", "flip").err


def test_copy__editors_find_the_schema_beside_the_copy(distill: Run, tmp_path: Path) -> None:
    assert distill("recipes", "copy", "quickstart", tmp_path / "my.yaml").code == 0
    for name, kind in (("my.yaml", FamilyRecipe), ("quickstart_teacher.yaml", TeacherRecipe)):
        first = (tmp_path / name).read_text().splitlines()[0]
        assert first.startswith(EDITOR_LINE)
        assert json.loads((tmp_path / first.removeprefix(EDITOR_LINE)).read_text()) == schema(kind)
    assert distill("recipes", "copy", tmp_path / "my.yaml", tmp_path / "two.yaml").code == 0
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "my.yaml").read_text()
    (tmp_path / "family.schema.json").write_text("{}")
    ended = distill("recipes", "copy", "quickstart", tmp_path / "three.yaml")
    assert ended.code == 2 and "family.schema.json: exists already" in ended.err
    assert not (tmp_path / "three.yaml").exists()
