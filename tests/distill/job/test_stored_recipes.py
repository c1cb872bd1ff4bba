"""A prepared job reads the recipes of its run folder, whatever happens to the user's files."""

import json
import shutil
from pathlib import Path

import pytest

from distill.job.prepare import Job, JobRequest, prepare, read_job
from distill.job.stored_recipes import load_from_here, read_recipes, write_recipes
from distill.listing.document import RESOLVED, RESOLVED_TEACHER, builtin_recipes
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.recipe.recipe_copy import copy_recipe
from distill.recipe.recipe_hash import recipe_hash
from tests.support.jobs import FAMILY, TEACHER, write_images

OVERRIDES = ("schedule.batch=8", "teacher:schedule.batch=8")
STORED_0_1_0 = Path(__file__).parents[2] / "fixtures" / "run-0.1.0" / "family"


def write_pair(folder: Path, train: str = "teacher.yaml") -> Path:
    """Recipes with relative paths, images and all; the family's path."""
    write_images(folder / "images")
    (folder / train).parent.mkdir(exist_ok=True)
    (folder / train).write_text(TEACHER.replace("DATA", "images"))
    text = FAMILY.replace("DATA", "images").replace("STEPS", "20").replace("teacher.yaml", train)
    (folder / "family.yaml").write_text(text)
    return folder / "family.yaml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(recipe: str, run_folder: str = "run") -> Job:
    request = JobRequest(recipe, OVERRIDES, run_folder, "")
    return prepare(request, num_ranks=2, fresh=False, say=lambda _: None)


@pytest.mark.parametrize("train", ["teacher.yaml", "parts/teacher.yaml", "recipe.yaml"])
def test_read_job__reads_the_run_folder_only(
    here: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    recipe = write_pair(here, train)
    job = start("family.yaml")
    recipe.write_text(recipe.read_text().replace("peak: 1.0e-3", "peak: 9.0e-3"))
    assert read_job(Path("run")) == job
    recipe.unlink()
    shutil.rmtree(here / "parts", ignore_errors=True)
    (here / train).unlink(missing_ok=True)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    shutil.move(here / "run", here / "moved")
    read = read_job(here / "moved")
    assert (read.recipe, read.teacher_recipe) == (job.recipe, job.teacher_recipe)
    assert (read.hash, read.networks) == (job.hash, job.networks)
    assert read.run_folder == here / "moved"
    assert read.recipe.data.sources[0].path == str(here / "images")
    assert read.recipe.schedule.batch == 8
    assert read.teacher_recipe is not None and read.teacher_recipe.schedule.batch == 8


def test_prepare__the_same_command_reads_the_users_file_again(here: Path) -> None:
    recipe = write_pair(here)
    before = start("family.yaml")
    recipe.write_text(recipe.read_text().replace("every: 1000", "every: 7"))
    after = start("family.yaml")
    assert (before.recipe.checkpoint.every, after.recipe.checkpoint.every) == (1000, 7)
    assert read_job(here / "run").recipe == after.recipe and after.hash == before.hash


def test_recipes_of_a_run_folder__are_recipes_that_can_be_run_and_copied(here: Path) -> None:
    write_pair(here, "parts/teacher.yaml")
    job = start("family.yaml")
    assert load_job(str(here / "run" / RESOLVED)) == (job.recipe, job.teacher_recipe)
    copy_recipe(str(here / "run" / RESOLVED), here / "new" / "mine.yaml")
    assert load_job(str(here / "new" / "mine.yaml")) == (job.recipe, job.teacher_recipe)


@pytest.mark.parametrize("name", builtin_recipes())
def test_write_recipes__come_back_with_the_same_hash(here: Path, name: str) -> None:
    recipes = load_from_here(name, ())
    (here / "run").mkdir()
    write_recipes(here / "run", name, (), recipes)
    assert read_recipes(here / "run") == recipes
    for given, stored in zip(load_job(name), read_recipes(here / "run"), strict=True):
        assert (given is None) == (stored is None)
        assert given is None or stored is None or recipe_hash(given) == recipe_hash(stored)


NASTY = [
    "a path with  two spaces and more than eighty letters of text, so that it could be broken",
    "# no comment",
    "key: value",
    "- item",
    "2e-4",
    "off",
    "~",
    "ünï 図 \N{PARTY POPPER}",
    "'quoted' \"twice\"",
    "line\nline\n\n",
    " edges ",
    "!tag &a *b {c} [d] % @ `",
]


def test_write_recipes__keep_every_text(here: Path) -> None:
    recipe = write_pair(here)
    args = {"texts": NASTY, "none": None, "empty": {}, "list": [], "number": 1e-7, "yes": True}
    student = {"name": "other", "arch": "timm:any", "args": args}
    students = f"students:\n  - {json.dumps(student, ensure_ascii=False)}"
    sources = json.dumps([f"/data/{text}" for text in NASTY], ensure_ascii=False)
    text = recipe.read_text().replace('[{path: "images"}]', sources)
    recipe.write_text(text.replace("students:", students))
    recipes = load_from_here(str(recipe), ())
    assert isinstance(recipes[0], FamilyRecipe) and recipes[0].students[0].args == args
    (here / "run").mkdir()
    write_recipes(here / "run", str(recipe), (), recipes)
    assert read_recipes(here / "run") == recipes


def test_read_recipes__of_many_sources_though_longer_than_a_recipe_may_be(here: Path) -> None:
    recipe = write_pair(here)
    sources = ", ".join(f"/data/of/a/collection/number-{i:04d}" for i in range(600))
    recipe.write_text(recipe.read_text().replace('[{path: "images"}]', f"[{sources}]"))
    recipes = load_from_here(str(recipe), ())
    (here / "run").mkdir()
    write_recipes(here / "run", str(recipe), (), recipes)
    assert (here / "run" / RESOLVED).stat().st_size > 50_000
    assert read_recipes(here / "run") == recipes


def test_read_job__of_earlier_versions(here: Path) -> None:
    job = read_job(STORED_0_1_0)  # paths as they stood in the recipe
    assert job.recipe.data.sources[0].path == "images" and job.teacher_recipe is None
    write_pair(here, "parts/teacher.yaml")
    job = start("family.yaml")
    (here / "run" / RESOLVED_TEACHER).rename(here / "run" / "teacher.yaml")  # as it lay until then
    assert read_job(here / "run").teacher_recipe == job.teacher_recipe
