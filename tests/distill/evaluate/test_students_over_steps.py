import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.data.index import ImageIndex
from distill.evaluate import students_over_steps as module
from distill.evaluate.run import evaluate_run
from distill.evaluate.students_over_steps import students_over_steps
from distill.export.save import ExportFacts, write_backbone
from distill.recipe.keys import FamilyRecipe, Recipe
from distill.recipe.reader import load_job
from tests.support.checkpoints import fresh_weights, save_checkpoint
from tests.support.jobs import write_recipes
from tests.support.scored_run import MEAN, STD, write_run, write_splits


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    return write_splits(tmp_path_factory.mktemp("images"), (4, 12))


@pytest.fixture
def run(
    tmp_path: Path, splits: tuple[ImageIndex, ImageIndex], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Two checkpoints of three students; the later one holds what was exported."""
    recipe: Recipe = load_job(
        str(write_recipes(tmp_path / "job", stage_steps=20, steps=4, save_every=2))
    )[0]
    assert isinstance(recipe, FamilyRecipe)
    (tmp_path / "run").mkdir()
    folder = write_run(tmp_path / "run", splits)
    shutil.rmtree(folder / "students")
    for step in (2, 4):
        weights = fresh_weights(recipe, step)
        for student in recipe.students:
            spec = student.backbone_spec()
            target = folder / "students" / student.label
            write_backbone(target, weights[student.label], spec, ExportFacts(32, MEAN, STD, {}))
        save_checkpoint(folder / "checkpoints", step, weights)
    job = SimpleNamespace(recipe=recipe, teacher_paths=(folder / "teacher",))
    monkeypatch.setattr(module, "read_job", lambda _: job)
    return folder


def test_students_over_steps__the_last_checkpoint_is_what_the_run_reports(run: Path) -> None:
    lines: list[str] = []
    history = students_over_steps(run, lines.append)
    order = [(each.step, each.student) for each in history]
    assert order == [(step, name) for step in (2, 4) for name in ("plain", "gated", "conv")]
    summary = evaluate_run(run)
    for each in history[3:]:
        entry = summary["agreement"]["networks"][each.student]
        assert vars(each.class_token) == entry["class"] and vars(each.patch) == entry["patch"]
        assert each.knn == summary["students"][each.student]["knn"]
    assert history[0].class_token != history[3].class_token  # other weights
    written = json.loads((run / "students-progress.json").read_text())
    assert [each["class_token"]["cka"] for each in written] == [e.class_token.cka for e in history]
    assert lines == [each.line for each in history] and "family step 2: plain shares" in lines[0]


def test_students_over_steps__without_labels_there_is_no_knn(
    run: Path, splits: tuple[ImageIndex, ImageIndex]
) -> None:
    replace(splits[1], labels=None).save(run / "data" / "train")
    assert [each.knn for each in students_over_steps(run, lambda _: None)] == [None] * 6


def test_students_over_steps__too_few_images_is_one_line(
    run: Path, splits: tuple[ImageIndex, ImageIndex]
) -> None:
    for part in ("train", "held_out"):
        splits[0].save(run / "data" / part)
    lines: list[str] = []
    assert students_over_steps(run, lines.append) == []
    assert lines == ["agreement: fewer than 30 images to compare neighbours on"]
