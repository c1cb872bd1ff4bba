"""Shipped recipes load; every rule has its message, line and column; all problems come at once."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from distill.data.index import make_index
from distill.data.locations import Location
from distill.data.sampler import Pool
from distill.data.sources import Found
from distill.errors import RecipeError
from distill.job.resolved_yaml import resolved_yaml
from distill.job.to_data import decoding_of, pools_of
from distill.listing.document import RESOLVED, builtin_recipes, find_recipe
from distill.recipe.extension_keys import Unread
from distill.recipe.interval_keys import CheckpointSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.networks import ArchSpec
from distill.recipe.reader import load_job, load_recipe, names_teacher_recipe
from distill.recipe.recipe_copy import copy_recipe
from distill.recipe.recipe_hash import recipe_hash
from distill.recipe.types import Section
from students.shapes import CATALOG, ConvNeXtSpec
from teacher.shapes import ViTSpec

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
        (FAMILY, "name: tiny", "name: teacher", "'teacher' is taken by the teacher"),
        (FAMILY, "name: tiny", "name: ../up", "'../up': use letters, digits"),
        (FAMILY, "width: 64", "width: 66", "r.yaml:5:.*width 66 over 2 heads"),
        (FAMILY, "width: 64, ", "", "free size: it needs 'width'"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1, 1]", "free size: it needs 'widths'"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1], widths: [8]", "needs two stages at least"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext, depths: [1, 1], widths: [8]", "1 widths for 2 depths"),
        (FAMILY, "arch: vit, width", "arch: vitb16, width", "'width' does not apply to arch 'vitb16'"),
        (FAMILY, "arch: vit, width: 64, depth: 2, heads: 2, patch: 16", "arch: convnext_tiny, key_bias: true", "'key_bias' does not apply to arch 'convnext_tiny'"),
        (TEACHER, "{arch: vit, width: 64, depth: 2, heads: 2, patch: 8}", "{arch: vit7b16, key_bias: true}", "model.key_bias: true: queries and values of vit7b16 have no bias either"),
        (FAMILY, "patch: 16}", "patch: 16, ranks: 0}", "students.1.ranks: 0: at least 1, or auto"),
        (FAMILY, "patch: 16}", "patch: 16, ranks: 3-1}", "students.1.ranks: '3-1': write a number of ranks, FIRST-LAST such as '8-15', or auto"),
        (FAMILY, "patch: 16}", "patch: 16, ranks: 2-3}", "students.0.ranks: auto: other students say which ranks, so write FIRST-LAST here too"),
        (FAMILY, "{weights: /models/teacher}", "{}", "give either 'train' .a teacher recipe. or 'weights'"),
        (FAMILY, "{weights: /models/teacher}", "{train: t.yaml, heads: h}", "'h' goes with 'weights'"),
        (FAMILY, "path: /data", "path: builtin:cats", "the only built-in images are 'builtin:photographs'"),
        (FAMILY, "schedule:", "crops: {global: 100}\nschedule:", "crops.global.size: 100 is not a multiple of 16 .* did you mean 96?"),
        (FAMILY, "schedule:", "crops: {blur_sigma: [2, 1]}\nschedule:", "crops.blur_sigma: .2.0, 1.0.: must satisfy 0 < low <= high"),
        (FAMILY, "schedule:", "crops: {blur: [1, 0.1, 1.5]}\nschedule:", "crops.blur"),
        (FAMILY, "schedule:", "crops: {eval_size: 40}\nschedule:", "crops.eval_size: 40 is not a multiple of 16 .* did you mean"),
        (FAMILY, "schedule:", "crops: {local: {scale: [0.5, 0.1]}}\nschedule:", "crops.local.scale: .0.5, 0.1.: must satisfy 0 < low <= high <= 1"),
        (FAMILY, "schedule:", "checkpoint: {export: true}\nschedule:", "checkpoint.export: true: write checkpoint.milestones too"),
        (TEACHER, "schedule:", "checkpoint: {export: true, milestones: 5}\nschedule:", "checkpoint.export: true: a recipe of a teacher has no students"),
        (FAMILY, "schedule:", "masks: {ratio: [0.5, 0.1]}\nschedule:", "masks.ratio: .0.5, 0.1.: must satisfy"),
        (FAMILY, "schedule:", "engine: {processes: 64}\nschedule:", "32 images for 64 processes"),
        (FAMILY, "schedule:", "engine: {processes: 0}\nschedule:", "engine.processes: 0: at least 1"),
        (FAMILY, "schedule:", "checkpoint: {every: often}\nschedule:", "'often': write a duration"),
        (FAMILY, "schedule:", "checkpoint: {every: 0}\nschedule:", "0: write a duration such as '30min', or a number of steps"),
        (FAMILY, "peak: 2e-4}", "peak: 2e-4}, rope_rescale: [2, 1]", "schedule.rope_rescale: .2.0, 1.0.: must satisfy"),
        (FAMILY, "peak: 2e-4}", "peak: 2e-4, end: 1e-6}", "schedule.lr.end: 1e-06: not used, since decay is constant - add decay: cosine, or leave end out"),
        (FAMILY, "peak: 2e-4}", "peak: 2e-4, decay_steps: 5}", "schedule.lr.decay_steps: 5: not used, since decay is constant"),
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


def test_load_recipe__an_unused_end_is_found_in_stages_and_overrides(tmp_path: Path) -> None:
    stage = TEACHER.replace("name: gram", "name: gram, lr: {peak: 1e-4, end: 0}")
    with pytest.raises(RecipeError, match=r"stages.1.lr.end: 0: not used"):
        load_recipe(write(tmp_path, stage))
    recipe = write(tmp_path, FAMILY)
    with pytest.raises(RecipeError, match=r"schedule.lr.end': 1e-06: not used"):
        load_recipe(recipe, ["schedule.lr.end=1e-6"])
    load_recipe(recipe, ["schedule.lr.end=1e-6", "schedule.lr.decay=cosine"])
    resolved = tmp_path / RESOLVED  # where every default is written out
    resolved.write_text(FAMILY.replace("peak: 2e-4}", "peak: 2e-4, end: 1e-6}"))
    load_recipe(resolved)


def test_load_job__names_what_a_recipe_was_renamed_to() -> None:
    with pytest.raises(RecipeError, match=r"was renamed: family_reported .* or family_released"):
        load_job("family_published")


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
    lines = caught.value.message.replace(f"{tmp_path}/", "").splitlines()
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
        "log=[jsonl,tensorboard]",
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
    recipes, schemas = ["my.yaml", "quickstart_teacher.yaml"], ["family", "teacher"]
    assert [path.name for path in written] == [
        *recipes,
        *(f"{each}.schema.json" for each in schemas),
    ]
    load_job(str(tmp_path / "my.yaml"))
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("quickstart", tmp_path / "my.yaml")


# A family with the teacher recipe that it trains first: rules between the two, hostile files, origins.

PAIR_FAMILY = """\
# a family
name: family
teacher: {train: teacher.yaml}
students:
  - vits16
  - {name: small, arch: vit, width: 64, depth: 2, heads: 2, patch: 8, lr: 2e-4}
  - {arch: convnext, depths: [1, 1], widths: [8, 16]}
data:
  sources: [{path: "builtin:photographs"}]
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
crops: {global: 64, local: {count: 2, size: 32, scale: [0.05, 0.32]}, flip: 0.5}
masks: {probability: 0.5, ratio: [0.1, 0.5]}
objective: {dino: 1.0, koleo: 0.1}
schedule:
  batch: 32
  steps: 1_000_000
  lr: {peak: 2e-4, warmup: 10}
  rope_rescale: [0.5, 2.0]
engine: {device: cpu, processes: 2, precision: fp32}
checkpoint: {every: 30min}
"""


PAIR_TEACHER = """\
name: teacher-recipe
model: {arch: vit, width: 64, depth: 2, heads: 2, patch: 8}
data: {sources: [{path: "builtin:photographs"}]}
crops: {global: 64, local: 32}
schedule: {batch: 32, lr: {peak: 1e-3}}
stages:
  - {name: base, steps: 30}
  - {name: gram, steps: 10, gram: {teacher: base@20, refresh: 5}}
"""


def write_pair(folder: Path, family: str = PAIR_FAMILY, teacher: str = PAIR_TEACHER) -> str:
    (folder / "teacher.yaml").write_text(teacher)
    (folder / "family.yaml").write_text(family)
    return str(folder / "family.yaml")


def edited(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def problems(
    folder: Path, family: str = PAIR_FAMILY, teacher: str = PAIR_TEACHER, *overrides: str
) -> list[str]:
    """First lines of the problems, without source lines and marks."""
    with pytest.raises(RecipeError) as caught:
        load_job(write_pair(folder, family, teacher), overrides)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    text = caught.value.message.replace(f"{folder}/", "")
    return [line for line in text.splitlines() if not re.match(r" +\d* \|", line)]


def test_load_job__four_kinds_of_mistakes_in_one_run(tmp_path: Path) -> None:
    text = edited(PAIR_FAMILY, "  batch: 32", '  batch: "many"\n  emma: 0.99')
    text = edited(text, "- vits16", "- vits16-plus")
    text = edited(text, "size: 32", "size: 30")
    assert problems(tmp_path, text) == [
        "family.yaml:5:5: students.0.arch: 'vits16-plus' is not known - did you mean 'vits16plus'?",
        "family.yaml:12:45: crops.local.size: 30 is not a multiple of 8 (small, convnext) - did you mean 32?",
        "family.yaml:16:10: schedule.batch: Input should be a valid integer (got 'many')",
        "family.yaml:17:3: unknown key 'schedule.emma' - did you mean 'ema'?",
        "4 problems in family.yaml.",
    ]


def test_load_job__a_wrong_neighbour_does_not_hide_a_rule(tmp_path: Path) -> None:
    text = edited(PAIR_FAMILY, "{count: 2, size: 32,", '{count: "two", size: 30, sise: 1,')
    found = problems(tmp_path, text)
    assert any(
        "crops.local.count: Input should be a valid integer (got 'two')" in one for one in found
    )
    assert any("crops.local.size: 30 is not a multiple" in one for one in found)
    assert any("unknown key 'crops.local.sise' - did you mean 'size'?" in one for one in found)


def test_load_job__problems_of_both_files_in_one_run(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        edited(PAIR_FAMILY, "flip: 0.5", "flip: 1.5"),
        edited(PAIR_TEACHER, "base@20", "base@31"),
    )
    assert found == [
        "family.yaml:12:77: crops.flip: Input should be less than or equal to 1 (got 1.5)",
        "1 problem in family.yaml.",
        "teacher.yaml:8:45: stages.1.gram.teacher: 'base@31': stage 'base' has steps 1 to 30",
        "1 problem in teacher.yaml.",
    ]


FAMILY_RULES = [
    (
        "- vits16\n",
        "- vit\n",
        "students.0.arch: arch 'vit' is a free size: it needs 'width', 'depth', 'heads'",
    ),
    (
        "- vits16\n",
        "- {arch: vits16, depth: 3}\n",
        "students.0.depth: 'depth' does not apply to arch 'vits16'",
    ),
    ("- vits16\n", "- resnet\n", "students.0.arch: 'resnet' is not known; known: vits16, "),
    (
        "heads: 2,",
        "heads: 3,",
        "students.1.heads: width 64 over 3 heads: each needs a multiple of 4",
    ),
    (
        "depths: [1, 1]",
        "depths: [1, 1, 1]",
        "students.2.widths: 2 widths for 3 depths: give one of each per",
    ),
    (
        "depths: [1, 1]",
        "depths: [1]",
        "students.2.depths: [1]: a ConvNeXt needs two stages at least",
    ),
    (
        "depths: [1, 1]",
        "depths: [1, 0]",
        "students.2.depths.1: Input should be greater than or equal to 1",
    ),
    (
        "name: small",
        "name: vits16",
        "students.1: two students are called 'vits16': give one a 'name'",
    ),
    (
        "name: small",
        "name: teacher",
        "students.1.name: 'teacher' is taken by the teacher: choose another",
    ),
    (
        "name: small",
        "name: ../small",
        "students.1.name: '../small': use letters, digits, '-', '_' and '.'",
    ),
    ("lr: 2e-4}", "ranks: 0}", "students.1.ranks: 0: at least 1, or auto"),
    (
        "patch: 8",
        "patch: 4",
        "students.1.patch: patches of 4 px are finer than the teacher's 8 px: use 8",
    ),
    (
        "global: 64",
        "global: 72",
        "crops.global.size: 72 is not a multiple of 16 (vits16) - did you mean 64?",
    ),
    (
        "scale: [0.05, 0.32]",
        "scale: [0.4, 0.3]",
        "crops.local.scale: [0.4, 0.3]: must satisfy 0 < low <= hi",
    ),
    (
        "ratio: [0.1, 0.5]",
        "ratio: [0.1, 1.5]",
        "masks.ratio: [0.1, 1.5]: must satisfy 0 <= low <= high <= 1",
    ),
    ("[0.5, 2.0]", "[0.0, 2.0]", "schedule.rope_rescale: [0.0, 2.0]: must satisfy 0 < low <= high"),
    ("std: [0.229", "std: [0.0", "data.std: [0.0, 0.224, 0.225]: each must be above 0"),
    (
        "mean: [0.485",
        "mean: [0.5",
        "data.mean: [0.5, 0.456, 0.406] is not the teacher recipe's [0.485, 0.456",
    ),
    ("processes: 2", "processes: 0", "engine.processes: 0: at least 1, or auto"),
    (
        "processes: 2",
        "processes: 33",
        "schedule.batch: 32 images for 33 processes: at least one image each",
    ),
    (
        "processes: 2",
        "processes: two",
        "engine.processes: Input should be a valid integer or 'auto' (got 'two')",
    ),
    (
        "builtin:photographs",
        "builtin:pictures",
        "data.sources.0.path: 'builtin:pictures': the only built-in",
    ),
    ("sources: [{path", "sources: [] #", "data.sources is empty: give one at least"),
    (
        "{train: teacher.yaml}",
        "{}",
        "teacher: give either 'train' (a teacher recipe) or 'weights' (a folder)",
    ),
    (
        "{train: teacher.yaml}",
        "{train: t, heads: h}",
        "teacher.heads: 'h' goes with 'weights': a trained",
    ),
    (
        "{train: teacher.yaml}",
        "{train: t.yaml}",
        "t.yaml does not exist; give its path relative to this recipe",
    ),
    (
        "{train: teacher.yaml}",
        "{train: family.yaml}",
        "teacher.train: 'family.yaml' has no stages, so trains no",
    ),
    (
        "every: 30min",
        "every: soon",
        "checkpoint.every: 'soon': write a duration such as '30min', '90s' or",
    ),
    (
        "every: 30min",
        "every: 0",
        "checkpoint.every: 0: write a duration such as '30min', or a number of steps",
    ),
    ("peak: 2e-4", "peak: .inf", "schedule.lr.peak: Input should be a finite number (got inf)"),
    ("peak: 2e-4, ", "", "schedule.lr.peak: is missing"),
    (
        "  batch: 32",
        '  batch: "32"',
        "schedule.batch: Input should be a valid integer (got '32') - did you mean 32,",
    ),
    (
        "1_000_000",
        "1e6",
        "schedule.steps: Input should be a valid integer (got 1000000.0) - did you mean 1000000?",
    ),
    (
        "name: family",
        "name: 2024",
        "name: Input should be a valid string (got 2024) - did you mean '2024', in",
    ),
    (
        "[0.5, 2.0]",
        "0.5",
        "schedule.rope_rescale is a list: write rope_rescale: [0.5, 0.5]",
    ),
    ("flip: 0.5", "ema: 0.5", "unknown key 'crops.ema' - did you mean 'schedule.ema'?"),
    ("flip: 0.5", "xyz: 0.5", "unknown key 'crops.xyz' - known here: global, local, flip"),
    ("students:", "studnts:", "unknown key 'studnts' - did you mean 'students'?"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAMILY_RULES, ids=lambda text: text[:24])
def test_load_job__each_mistake_in_a_family(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = edited(PAIR_FAMILY, old, new)
    found = problems(tmp_path, text)
    matching = [line for line in found if message in line]
    assert matching, "\n".join(found)
    assert re.match(r"family\.yaml:\d+:\d+: ", matching[0])


def test_load_job__koleo_needs_two_images(tmp_path: Path) -> None:
    text = edited(edited(PAIR_FAMILY, "batch: 32", "batch: 1"), "processes: 2", "processes: 1")
    assert (
        "family.yaml:16:10: schedule.batch: 1: koleo compares images" in problems(tmp_path, text)[0]
    )
    load_job(write_pair(tmp_path, edited(text, "koleo: 0.1", "koleo: 0")))


@pytest.mark.parametrize(
    ("engine", "cause"),
    [("zero: 3", "engine.zero: 3"), ("micro_batch: 16", "a number as engine.micro_batch")],
)
def test_load_job__koleo_groups_that_fixed_parts_would_cut(
    tmp_path: Path, engine: str, cause: str
) -> None:
    text = edited(PAIR_FAMILY, "batch: 32", "batch: 32\n  koleo_group: 40")
    path = write_pair(tmp_path, text)
    load_job(path)
    override = "engine." + engine.replace(": ", "=")
    message = f"schedule.koleo_group: 40: with {re.escape(cause)} it must be 2, 4, 8 or 16"
    with pytest.raises(RecipeError, match=message):
        load_job(path, [override])
    load_job(path, [override, "schedule.koleo_group=8"])


def test_load_job__local_crops_that_are_not_made_may_have_any_size(tmp_path: Path) -> None:
    text = edited(PAIR_FAMILY, "count: 2, size: 32", "count: 0, size: 30")
    load_job(write_pair(tmp_path, text))


TEACHER_RULES = [
    (
        "arch: vit,",
        "arch: convnext_tiny,",
        "model.arch: 'convnext_tiny' has no mask token: a teacher must be",
    ),
    (
        "global: 64",
        "global: 60",
        "crops.global.size: 60 is not a multiple of 8 (vit) - did you mean 64?",
    ),
    (
        "name: gram,",
        "name: base,",
        "stages.1.name: 'base' is taken: stages need different names, none 'heads' or 'family'",
    ),
    ("name: gram,", "name: family,", "stages.1.name: 'family' is taken"),
    (
        "base@20",
        "base",
        "stages.1.gram.teacher: 'base': write an earlier stage and a step of it, such as",
    ),
    (
        "base@20",
        "gram@5",
        "stages.1.gram.teacher: 'gram@5': 'gram' is not an earlier stage (earlier: base)",
    ),
    ("base@20", "base@0", "stages.1.gram.teacher: 'base@0': stage 'base' has steps 1 to 30"),
    (
        "batch: 32",
        "batch: 1",
        "schedule.batch: 1: koleo compares images, so it needs a batch of at least 2",
    ),
    (
        "refresh: 5",
        "resolution: 1.3",
        "stages.1.gram.resolution: 1.3 times 64 px is 83.2 px, not a multiple of the patch of 8",
    ),
    (
        "steps: 30",
        "steps: 30, crops: [{global: 64, local: 36}]",
        "stages.0.crops.0.local: 36 is not a multiple of 8 (vit) - did you mean 32?",
    ),
    (
        "steps: 10",
        "steps: 10, batch: 1",
        "stages.1.batch: 1: koleo compares images, so it needs a batch of at least 2",
    ),
    ("refresh: 5", "refreshh: 5", "unknown key 'stages.1.gram.refreshh' - did you mean 'refresh'?"),
]


@pytest.mark.parametrize(("old", "new", "message"), TEACHER_RULES, ids=lambda text: text[:24])
def test_load_job__each_mistake_in_a_teacher(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    found = problems(tmp_path, PAIR_FAMILY, edited(PAIR_TEACHER, old, new))
    matching = [line for line in found if message in line]
    assert matching, "\n".join(found)
    assert re.match(r"teacher\.yaml:\d+:\d+: ", matching[0])


def test_load_job__a_wrong_stage_name_causes_no_second_complaint(tmp_path: Path) -> None:
    found = problems(tmp_path, PAIR_FAMILY, edited(PAIR_TEACHER, "name: base", "name: a/b"))
    assert len(found) == 2
    assert "stages.0.name" in found[0]


def test_load_job__overrides_of_both_recipes(tmp_path: Path) -> None:
    overrides = (
        "schedule.batch=16",
        "students.0.lr=1e-3",
        "crops.global.size=128",
        "data.sources=[{path: /images}]",
        "schedule.teacher_temperature.end=0.06",
        "teacher:stages.1.gram.weight=1.5",
        "teacher:schedule.lr={peak: 5e-4}",
    )
    family, teacher = load_job(write_pair(tmp_path), overrides)
    assert isinstance(family, FamilyRecipe)
    assert teacher is not None
    assert family.schedule.batch == 16
    assert family.students[0].lr == 1e-3
    assert family.crops.global_.size == 128
    assert family.data.sources[0].path == "/images"
    assert family.schedule.teacher_temperature.end == 0.06
    assert teacher.stages[1].gram is not None
    assert teacher.stages[1].gram.weight == 1.5
    assert teacher.schedule.lr.peak == 5e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedule.emma=1",
            "override 'schedule.emma': unknown key 'schedule.emma' - did you mean 'ema'?",
        ),
        (
            "shedule.batch=1",
            "override 'shedule': unknown key 'shedule' - did you mean 'schedule'?",
        ),
        (
            "schedule.batch=x",
            "override 'schedule.batch': Input should be a valid integer (got",
        ),
        (
            "crops.local.size=30",
            "override 'crops.local.size': 30 is not a multiple of 16",
        ),
        (
            "students.9.lr=1",
            "override 'students.9.lr=1': there is no 'students.9.lr' in this recipe",
        ),
        ("seed.x=1", "override 'seed.x=1': there is no 'seed.x' in this recipe"),
        ("batch", "override 'batch': write KEY=VALUE, such as schedule.batch=32"),
        ("a..b=1", "override 'a..b=1': write KEY=VALUE"),
        ("schedule.batch=[1", "override 'schedule.batch=[1': '[1' is not a YAML value"),
        (
            "teacher:stages.0.stepz=1",
            "override 'stages.0.stepz': unknown key 'stages.0.stepz' - did you mean",
        ),
    ],
)
def test_load_job__wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    found = problems(
        tmp_path,
        edited(PAIR_FAMILY, "name: family", "name: family\nseed: 0"),
        PAIR_TEACHER,
        override,
    )
    assert [line for line in found if line.startswith(message)], "\n".join(found)


def test_load_job__a_teacher_from_a_folder_is_not_read(tmp_path: Path) -> None:
    path = write_pair(
        tmp_path, edited(PAIR_FAMILY, "train: teacher.yaml", "weights: /models/vit7b16")
    )
    assert load_job(path)[1] is None
    assert not names_teacher_recipe(path)


def test_load_job__folders_are_checked_when_asked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "deep").mkdir(parents=True)
    (tmp_path / "full" / "deep" / "a.JPG").touch()
    sources = ", ".join(f'{{path: "{tmp_path / name}"}}' for name in ("full", "empty", "nowhere"))
    text = edited(PAIR_FAMILY, '{path: "builtin:photographs"}', sources)
    text = edited(text, "train: teacher.yaml", "weights: /no/teacher")
    load_job(write_pair(tmp_path, text))
    with pytest.raises(RecipeError) as caught:
        load_job(write_pair(tmp_path, text), check_folders=True)
    message = caught.value.message
    assert re.search(r"family.yaml:3:20: teacher.weights: '/no/teacher' is not there", message)
    assert re.search(
        r"family.yaml:9:\d+: data.sources.1.path: '.*empty' holds no image \(bmp,", message
    )
    assert re.search(r"data.sources.2.path: '.*nowhere' is not there or no source", message)
    assert "3 problems" in message


BROKEN = [
    ("- a list\n", r"family.yaml:1:1: a recipe is a mapping of keys to values"),
    ("", r"family.yaml:1:1: a recipe is a mapping"),
    ("name: x\nname: y\n", r'family.yaml:2:1: found duplicate key "name"'),
    ("name: x\n\tseed: 1\n", r"family.yaml:2:1: found character '\\t' that cannot start any token"),
    ("name: x\n", r"family.yaml:1:1: needs either 'students' .* or 'stages' .*, has neither"),
    ("a: &a\n  b: *a\n", r"family.yaml:1:1: needs either"),  # a part of itself reads as null
    ("a: " + "[" * 5000, r"family.yaml"),
    ("name: \x07\n", r"family.yaml: not YAML"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=lambda text: text[:12])
def test_load_recipe__what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_load_recipe__files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)
    path.write_bytes(b"#" * 50_001)
    with pytest.raises(RecipeError, match="larger than 50 kB"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 51 + "]" * 51, "more than 50 brackets are open at once"),
        ("{a: 1}: x", "line 1: .* is no key"),
        ("1.5: x", "line 1: '1.5' is no key"),
        ("{[1]: {}}: x", "not YAML"),
        ("a: &one 1\nb: &one 2\nc: *one", "duplicate anchor 'one'"),
        ("!!python/object/apply:os.system ['true']", "a recipe is a mapping"),
    ],
)
def test_load_recipe__strange_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "strange.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in caught.value.message


def test_load_recipe__aliases_may_not_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="more than 10000 values"):
        load_recipe(path)


def test_load_recipe__merged_keys(tmp_path: Path) -> None:
    text = edited(
        PAIR_FAMILY,
        "- vits16\n",
        "- &shared {name: one, arch: vit, width: 64, depth: 2, heads: 2, patch: 8}\n",
    )
    text = edited(
        text,
        "- {arch: convnext, depths: [1, 1], widths: [8, 16]}",
        "- {<<: *shared, name: two, depth: 3}",
    )
    path = write_pair(tmp_path, text)
    recipe = load_recipe(Path(path))
    assert isinstance(recipe, FamilyRecipe)
    assert (recipe.students[2].label, recipe.students[2].depth, recipe.students[2].width) == (
        "two",
        3,
        64,
    )
    Path(path).write_text(edited(text, "heads: 2, patch: 8}", "heads: 3, patch: 8}"))
    with pytest.raises(
        RecipeError, match=r"family.yaml:7:5: students.2.heads: width 64 over 3 heads"
    ):
        load_recipe(Path(path))


def test_copy_recipe__a_teacher_recipe_that_is_there_already(tmp_path: Path) -> None:
    mine = tmp_path / "new" / "mine.yaml"
    assert copy_recipe("quickstart", mine)[:2] == [mine, mine.parent / "quickstart_teacher.yaml"]
    assert load_job(str(mine)) == load_job("quickstart")
    copy_recipe("quickstart", mine.parent / "second.yaml")  # the same teacher recipe may be there
    with pytest.raises(RecipeError, match=r"mine.yaml: exists already"):
        copy_recipe("quickstart", mine)
    (mine.parent / "quickstart_teacher.yaml").write_text("my own")
    with pytest.raises(RecipeError, match=r"quickstart_teacher.yaml: exists already"):
        copy_recipe("quickstart", mine.parent / "third.yaml")
    assert not (mine.parent / "third.yaml").exists()


def test_resolved_yaml__every_value_has_its_origin_and_reads_back(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    overrides = ["schedule.batch=16", "crops.local={size: 48}", "students.1.depth=3"]
    family, _ = load_job(path, overrides)
    text = resolved_yaml(path, overrides, family)
    for line in text.splitlines():
        is_section = line.rstrip().endswith(":")
        assert is_section or re.search(r"# (recipe|override|default)$", line), line
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(text)
    assert load_recipe(resolved) == family


def test_resolved_yaml__tells_recipe_override_and_default_apart(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    overrides = ["schedule.batch=16", "crops.local={size: 48}", "students.1.depth=3"]
    tree = YAML().load(resolved_yaml(path, overrides, load_job(path, overrides)[0]))

    def origin(*place: str | int) -> str:
        node = tree
        for key in place[:-1]:
            node = node[key]
        return str(node.ca.items[place[-1]][2].value).strip("# \n")

    assert origin("seed") == "default"
    assert origin("name") == "recipe"
    assert origin("schedule", "batch") == "override"
    assert origin("schedule", "ema") == "default"
    assert origin("schedule", "rope_rescale") == "recipe"
    assert origin("crops", "global", "size") == "recipe"  # written as a bare number
    assert origin("crops", "global", "scale") == "default"
    assert origin("crops", "local", "size") == "override"
    assert origin("crops", "local", "count") == "default"  # the override replaced the section
    assert origin("students", 0, "arch") == "recipe"
    assert origin("students", 0, "head_widths", "dino_hidden") == "default"
    assert origin("students", 1, "depth") == "override"
    assert origin("students", 1, "width") == "recipe"


@pytest.mark.parametrize("section", all_sections(), ids=lambda kind: kind.__name__)
def test_section__is_frozen_strict_and_closed(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), name
        assert extra["role"] in ("science", "machine"), name
    assert section.model_config["frozen"]
    assert section.model_config["strict"]
    # the keys of a package that is not imported are known to that package only
    assert section.model_config["extra"] == ("allow" if section is Unread else "forbid")


def test_arch_spec__strides_of_names() -> None:
    strides = {name: ArchSpec(arch=name).stride for name in CATALOG}
    assert strides == {name: 16 if name.startswith("vit") else 32 for name in CATALOG}


def test_backbone_spec__of_a_name_and_of_free_sizes() -> None:
    assert ArchSpec(arch="vitl16").backbone_spec() == CATALOG["vitl16"]
    free = ArchSpec(arch="vit", width=64, depth=2, heads=2, patch=8, ffn="swiglu").backbone_spec()
    assert free == ViTSpec(64, 2, 2, 256, 8, "swiglu")
    wide = ArchSpec(arch="vit", width=64, depth=2, heads=2, ffn_width=96).backbone_spec()
    assert wide == ViTSpec(64, 2, 2, 96, 16, "mlp")
    convnext = ArchSpec(arch="convnext", depths=(1, 2, 1), widths=(8, 16, 32))
    assert convnext.backbone_spec() == ConvNeXtSpec((1, 2, 1), (8, 16, 32))
    assert convnext.stride == 16


@pytest.mark.parametrize(
    ("every", "seconds", "steps"),
    [("90s", 90.0, None), ("30min", 1800.0, None), ("1.5h", 5400.0, None), (500, None, 500)],
)
def test_checkpoint_spec__every(every: str | int, seconds: float | None, steps: int | None) -> None:
    spec = CheckpointSpec(every=every)
    assert (spec.every_s, spec.every_steps) == (seconds, steps)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a, batches: pure}]", "sources.0.weight': missing, and batches: pure needs one"),
        ("[{path: a, weight: 1.0}, {path: b}]", "sources.1.weight': missing, and other sources"),
        (
            "[{path: a, std: [1.0, 1.0, 1.0]}]",
            "sources.0.weight': missing, and a separate mean or std",
        ),
        ("[{path: a, weight: 1.0, std: [0.0, 1.0, 1.0]}]", "std': .*each must be above 0"),
        ("[{path: a, weight: 0.0}]", "sources.0.weight': Input should be greater than 0"),
        ("[{path: a, weight: 1.0, batches: some}]", "batches': Input should be 'mixed' or 'pure'"),
    ],
)
def test_sources__what_does_not_go_together(sources: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, FAMILY), [f"data.sources={sources}"])


def test_sources__become_pools_of_the_sampler(tmp_path: Path) -> None:
    found = [Found(Location.of(Path(f"/x/{i}.png")), "") for i in range(5)]
    index = make_index(found, [(8, 8)] * 5, (("a", 2), ("b", 3)))
    path = write(tmp_path, FAMILY)
    plain = load_recipe(path, ["data.sources=[a, b]"])
    assert pools_of(plain.data, index) == [Pool(0, 5)]
    sources = (
        "[{path: a, weight: 0.9, mean: [0.1, 0.2, 0.3]}, {path: b, weight: 0.1, batches: pure}]"
    )
    mixed = load_recipe(path, [f"data.sources={sources}"])
    usual = (mixed.data.mean, mixed.data.std)
    assert pools_of(mixed.data, index) == [
        Pool(0, 2, 0.9, False, ((0.1, 0.2, 0.3), mixed.data.std)),
        Pool(2, 5, 0.1, True, usual),
    ]
    assert recipe_hash(plain) != recipe_hash(mixed)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("mean", (124, 116, 104)),  # of data.mean
        ("stored", None),
        ("[255, 0, 10]", (255, 0, 10)),
        ("'#Ff000a'", (255, 0, 10)),
    ],
)
def test_background__a_colour_the_mean_or_as_stored(
    written: str, expected: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    path = write(tmp_path, FAMILY)
    plain, other = load_recipe(path), load_recipe(path, [f"data.background={written}"])
    assert decoding_of(other.data).background == expected
    assert (recipe_hash(plain) == recipe_hash(other)) == (written == "mean")


@pytest.mark.parametrize(
    "written", ["white", "[1, 2]", "[0.5, 0.5, 0.5]", "[0, 0, 256]", "#ffffff"]
)
def test_background__what_is_none_of_them(written: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"write mean, stored, '#rrggbb' in quotes, or \[red, gr"):
        load_recipe(write(tmp_path, FAMILY), [f"data.background={written}"])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("width: 64", f"width: 1{'0' * 400}", "students.1.width: a number of about 400 digits"),
        ("batch: 32", f"batch: {2**63}", "schedule.batch: a number of about 19 digits: at most"),
        ("name: test", f"name: test\nseed: {'9' * 30}", "seed: a number of about 30 digits"),
        ("peak: 2e-4", "peak: 1e200", "schedule.lr.peak: 1e+200: at most 1e+30 is allowed"),
        ("scale: [0.3, 1.0]", "scale: [0.3, 1e200]", "crops.global.scale: 1e+200: at most"),
        (
            "data: {",
            f"checkpoint: {{every: {'9' * 400}h}}\ndata: {{",
            "checkpoint.every: a duration of 400 digits",
        ),
        (
            "name: tiny,",
            f"name: tiny, ranks: 0-{'9' * 400},",
            "students.1.ranks: '0-999",
        ),
    ],
)
def test_load_job__numbers_that_no_plan_can_be_computed_with(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    text = FAMILY.replace("data:", "crops: {global: {scale: [0.3, 1.0]}}\ndata:")
    assert before in text
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        load_job(str(write(tmp_path, text.replace(before, after))))
    assert "\n1 problem in" in caught.value.message


def test_load_job__takes_a_seed_of_64_bits(tmp_path: Path) -> None:
    recipe, _ = load_job(str(write(tmp_path, f"seed: {2**63 - 1}\n{FAMILY}")))
    assert recipe.seed == 2**63 - 1
