"""Shipped recipes load; every rule has its message, line and column; all problems come at once."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from distill.errors import RecipeError
from distill.recipe import FamilyRecipe, Section, TeacherRecipe, recipe_hash
from distill.recipe_file import (
    builtin_recipes,
    copy_recipe,
    find_recipe,
    load_job,
    load_recipe,
    resolved_yaml,
)

FAMILY = """\
name: test
teacher: {weights: /models/teacher}
students:
  - vits16
  - {name: tiny, arch: vit, width: 64, depth: 2, heads: 2, patch: 16}
data: {sources: [{path: /data}]}
schedule: {batch: 32, steps: 1_000, lr: {peak: 2e-4}}
"""
TEACHER = """\
name: test
model: {arch: vit, width: 64, depth: 2, heads: 2, patch: 8}
data: {sources: [{path: /data}]}
schedule: {batch: 32, lr: {peak: 2e-4}}
stages:
  - {name: base, steps: 20}
  - {name: gram, steps: 10, gram: {teacher: base@10}}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", builtin_recipes())
def test_load_job__every_shipped_recipe_loads(name: str) -> None:
    recipe, teacher = load_job(name)
    assert recipe.name and (teacher is None or isinstance(teacher, TeacherRecipe))
    head = find_recipe(name).read_text().splitlines()
    assert head[0].startswith("# ") and any("distill " in line for line in head[:4])


def test_load_recipe__numbers_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FAMILY))
    assert isinstance(recipe, FamilyRecipe)
    assert (recipe.schedule.steps, recipe.schedule.lr.peak) == (1000, 2e-4)
    assert [student.label for student in recipe.students] == ["vits16", "tiny"]
    assert recipe.students[1].backbone_spec().width == 64


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        (FAMILY, "vits16\n", "vits61\n", "r.yaml:4:5: students.0: arch: 'vits61' is not known|r.yaml:4:5: students.0.arch: 'vits61' is not known - did you mean 'vits16'"),
        (FAMILY, "batch: 32", "batch: many", "r.yaml:7:19: schedule.batch: Input should be a valid integer .got 'many'"),
        (FAMILY, "steps:", "stepps:", "unknown key 'schedule.stepps' - did you mean 'steps'?"),
        (FAMILY, "name: tiny", "name: vits16", "two students are called 'vits16'"),
        (FAMILY, "name: tiny", "name: teacher", "'teacher' is the teacher's name"),
        (FAMILY, "name: tiny", "name: ../up", "'../up': use letters, digits"),
        (FAMILY, "width: 64", "width: 66", "r.yaml:5:.*width 66 over 2 heads"),
        (FAMILY, "width: 64, ", "", "free size: it needs 'width'"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1, 1]", "free size: it needs 'widths'"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1], widths: [8]", "needs two stages at least"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1, 1], widths: [8]", "1 widths for 2 depths"),
        (FAMILY, "arch: vit, width", "arch: vitb16, width", "'width' does not apply to arch 'vitb16'"),
        (FAMILY, "patch: 16}", "patch: 16, ranks: 0}", "students.1.ranks: 0: at least 1, or auto"),
        (FAMILY, "{weights: /models/teacher}", "{}", "give either 'train' .a teacher recipe. or 'weights'"),
        (FAMILY, "{weights: /models/teacher}", "{train: t.yaml, heads: h}", "'heads' goes with 'weights'"),
        (FAMILY, "path: /data", "path: builtin:cats", "the only built-in images are 'builtin:photographs'"),
        (FAMILY, "schedule:", "crops: {global: 100}\nschedule:", "crops.global.size: 100 is not a multiple of 16 .* did you mean 96?"),
        (FAMILY, "schedule:", "crops: {local: {scale: [0.5, 0.1]}}\nschedule:", "crops.local.scale: .0.5, 0.1.: must satisfy 0 < low <= high <= 1"),
        (FAMILY, "schedule:", "masks: {ratio: [0.5, 0.1]}\nschedule:", "masks.ratio: .0.5, 0.1.: must satisfy"),
        (FAMILY, "schedule:", "engine: {processes: 64}\nschedule:", "32 images for 64 processes"),
        (FAMILY, "schedule:", "engine: {processes: 0}\nschedule:", "engine.processes: 0: at least 1"),
        (FAMILY, "schedule:", "checkpoint: {every: often}\nschedule:", "'often': write a duration"),
        (FAMILY, "schedule:", "checkpoint: {every: 0}\nschedule:", "0: write a duration such as '30min', or a number of steps"),
        (FAMILY, "peak: 2e-4}", "peak: 2e-4}, rope_rescale: [2, 1]", "schedule.rope_rescale: .2.0, 1.0.: must satisfy"),
        (FAMILY, "name: test\n", "", "r.yaml:1:1: name: is missing"),
        (TEACHER, "base@10", "base@21", "'base@21': stage 'base' has steps 1 to 20"),
        (TEACHER, "base@10", "gram@1", "'gram' is not an earlier stage .earlier: base"),
        (TEACHER, "base@10", "base", "'base': write an earlier stage and a step of it"),
        (TEACHER, "name: gram", "name: base", "'base' is taken: stages need different names"),
        (TEACHER, "{arch: vit, width: 64, depth: 2, heads: 2, patch: 8}", "convnext_tiny", "'convnext_tiny' has no mask token: a teacher must be a ViT"),
    ],
)  # fmt: skip
def test_load_recipe__says_what_is_wrong(
    text: str, old: str, new: str, expected: str, tmp_path: Path
) -> None:
    assert old in text
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text.replace(old, new, 1)))
    assert re.search(expected, caught.value.message), caught.value.message


def test_load_recipe__all_problems_at_once_with_places(tmp_path: Path) -> None:
    text = """\
name: bad
teacher: {weights: /models/teacher}
students:
  - vits16-plus
  - vitb16
data: {sources: [{path: /data}]}
crops:
  global: 256
  local: {size: 98}
schedule: {batch: "32", steps: 10, lr: {peak: 1e-4}, emma: 0.9}
"""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    lines = caught.value.message.splitlines()
    starts = [line for line in lines if line.startswith("r.yaml:")]
    assert [start.split(": ")[0] for start in starts] == [
        "r.yaml:4:5",
        "r.yaml:9:17",
        "r.yaml:10:19",
        "r.yaml:10:54",
    ]
    assert "did you mean 'vits16plus'?" in starts[0]
    assert "did you mean 96?" in starts[1]
    assert "did you mean 'ema'?" in starts[3]
    assert lines[1] == "     4 |   - vits16-plus" and lines[2] == "       |     ^"
    assert lines[-1] == "4 problems in r.yaml." and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", r"r.yaml:2:1: "),
        ("a: 1\na: 2\n", "found duplicate key"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("name: x\n", "needs either 'students' .a family. or 'stages'"),
        (
            "!!python/object/apply:os.system ['true']\n",
            "a recipe is a mapping|could not determine a constructor",
        ),
    ],
)
def test_load_recipe__broken_yaml_is_one_clear_line(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_load_recipe__not_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)


def test_find_recipe__suggests_a_builtin() -> None:
    with pytest.raises(
        RecipeError,
        match="quickstrat: no such recipe file or built-in recipe - did you mean 'quickstart'",
    ):
        find_recipe("quickstrat")


def test_overrides__replace_values_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, FAMILY)
    recipe = load_recipe(path, ["schedule.batch=48", "students.1.depth=3", "crops.local.count=2"])
    assert isinstance(recipe, FamilyRecipe)
    assert (recipe.schedule.batch, recipe.students[1].depth, recipe.crops.local.count) == (48, 3, 2)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["schedule.bach=1", "nonsense", "students.9.depth=3"])
    message = caught.value.message
    assert (
        "override 'schedule.bach': unknown key 'schedule.bach' - did you mean 'batch'?" in message
    )
    assert "override 'nonsense': write KEY=VALUE" in message
    assert "there is no 'students.9.depth' in this recipe" in message


def test_load_job__teacher_overrides_reach_the_teacher() -> None:
    recipe, teacher = load_job("quickstart", ["teacher:schedule.batch=16"])
    assert teacher is not None and (teacher.schedule.batch, recipe.schedule.batch != 16) == (
        16,
        True,
    )
    with pytest.raises(RecipeError, match="this recipe trains no teacher"):
        load_job("quickstart_teacher", ["teacher:seed=1"])


def test_load_job__missing_teacher_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, FAMILY.replace("weights: /models/teacher", "train: gone.yaml"))
    with pytest.raises(RecipeError, match=r"teacher.train: .*gone.yaml does not exist"):
        load_job(str(path))


def sections(kind: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    for field in kind.model_fields.values():
        for inner in re.findall(r"\w+(?:Spec|Source)\b", repr(field.annotation)):
            found = next(s for s in all_sections() if s.__name__ == inner)
            if found not in seen:
                sections(found, seen | {found})
                seen.add(found)
    return seen


def all_sections(kind: type[BaseModel] = Section) -> list[type[BaseModel]]:
    return [s for child in kind.__subclasses__() for s in (child, *all_sections(child))]


def test_every_key__is_science_or_machine() -> None:
    for section in all_sections():
        for name, field in section.model_fields.items():
            extra: Any = field.json_schema_extra
            assert extra and extra["role"] in ("science", "machine"), f"{section.__name__}.{name}"


def test_recipe_hash__covers_science_and_not_machine(tmp_path: Path) -> None:
    path = write(tmp_path, FAMILY)
    base = recipe_hash(load_recipe(path))
    for machine in (
        "name=other",
        "engine.processes=3",
        "checkpoint.keep=9",
        "data.num_threads=4",
        "students.0={arch: vits16, ranks: 2}",
    ):
        assert recipe_hash(load_recipe(path, [machine])) == base, machine
    for science in (
        "seed=1",
        "schedule.lr.peak=1e-3",
        "crops.local.count=4",
        "students.1.depth=3",
        "data.mean=[0, 0, 0]",
    ):
        assert recipe_hash(load_recipe(path, [science])) != base, science


def test_resolved_yaml__says_where_each_value_comes_from_and_loads_again(tmp_path: Path) -> None:
    path = write(tmp_path, FAMILY)
    recipe = load_recipe(path, ["schedule.batch=48"])
    text = resolved_yaml(str(path), ["schedule.batch=48"], recipe)
    for pattern in (
        r"batch: 48 +# override",
        r"steps: 1000 +# recipe",
        r"clip: 3.0 +# default",
        r"arch: vits16 +# recipe",
    ):
        assert re.search(pattern, text), (pattern, text)
    assert YAML(typ="safe").load(text)["schedule"]["batch"] == 48
    assert load_recipe(write(tmp_path, text)) == recipe


def test_copy_recipe__brings_the_teacher_recipe_along(tmp_path: Path) -> None:
    written = copy_recipe("quickstart", tmp_path / "my.yaml")
    assert [path.name for path in written] == ["my.yaml", "quickstart_teacher.yaml"]
    load_job(str(tmp_path / "my.yaml"))
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("quickstart", tmp_path / "my.yaml")
