"""Students of milestones: complete or absent, once, with the scores that ``eval --over-steps`` gives."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.data.index import ImageIndex
from distill.evaluate import milestones, students_over_steps
from distill.evaluate.milestones import MilestoneWriter, left_milestones, write_after
from distill.export.licences import Licences
from distill.export.save import ExportFacts, write_backbone
from distill.job.origin import store_licences
from distill.job.prepare import Job, JobRequest
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.runfolder.manifest import checkpoints
from distill.weights.load import load_backbone
from tests.support.checkpoints import fresh_weights, save_checkpoint
from tests.support.exports import VIT, names
from tests.support.jobs import write_recipes
from tests.support.scored_run import MEAN, STD, write_run, write_splits


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    return write_splits(tmp_path_factory.mktemp("images"), (4, 12))


@pytest.fixture
def run(
    tmp_path: Path, splits: tuple[ImageIndex, ImageIndex], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Three checkpoints of three students, the first two of milestones; no student is exported yet."""
    path = str(write_recipes(tmp_path / "job", stage_steps=20, steps=6, save_every=2))
    wanted = ["checkpoint.export=true", "checkpoint.milestones=2", "format=2"]
    recipe, teacher = load_job(path, wanted)
    assert isinstance(recipe, FamilyRecipe)
    (tmp_path / "run").mkdir()
    folder = write_run(tmp_path / "run", splits)
    shutil.rmtree(folder / "students")
    store_licences(folder, Licences())
    for step in (2, 4, 6):
        weights = fresh_weights(recipe, step)
        save_checkpoint(folder / "checkpoints", step, weights, is_milestone=step < 6)
    job = Job(JobRequest(path, (), str(folder), "distill train"), recipe, teacher, "feed")
    for module in (milestones, students_over_steps):
        monkeypatch.setattr(module, "read_job", lambda _: job)
    return folder


def test_write_left__every_milestone_once_with_its_scores(run: Path) -> None:
    lines: list[str] = []
    writer = MilestoneWriter(run, lines.append)
    assert writer.write_left() == 2 and left_milestones(run) == []
    assert names(run / "milestones") == {"family-0000002", "family-0000004"}
    folder = run / "milestones" / "family-0000002" / "gated"
    record = json.loads((folder / "distill.json").read_text())
    assert (
        record["steps"] == record["milestone"]["step"] == 2 and record["method"] == "distillation"
    )
    history = students_over_steps.students_over_steps(run, lambda _: None)
    expected = next(each for each in history if (each.step, each.student) == (2, "gated"))
    assert record["milestone"]["knn"] == expected.knn
    assert record["milestone"]["agreement"]["class"] == vars(expected.class_token)
    card = (folder / "README.md").read_text()
    assert card.splitlines()[card.splitlines().index("# gated")] == "# gated"
    assert f"| this network | {expected.knn:.3f} |" in card
    first, second = (
        load_backbone(run / "milestones" / f"family-000000{step}" / "gated")[0].state_dict()
        for step in (2, 4)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert lines[-1] == "wrote milestones/family-0000004"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert writer.write_left() == MilestoneWriter(run, lines.append).write_left() == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_write_left__an_end_in_the_middle_leaves_nothing_and_is_made_good(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = write_backbone, list[str]()

    def dying(folder: Path, *facts: object) -> None:
        calls.append(folder.name)
        right(folder, *facts)  # type: ignore[arg-type]
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(milestones, "write_backbone", dying)
    with pytest.raises(KeyboardInterrupt):
        MilestoneWriter(run, lambda _: None).write_left()
    assert [path for path in (run / "milestones").iterdir() if path.name[0] != "."] == []
    half = run / "milestones" / ".family-0000002.part" / "plain"  # what a kill leaves
    half.mkdir(parents=True)
    monkeypatch.setattr(milestones, "write_backbone", right)
    assert write_after(run, lambda _: None) == []
    assert names(run / "milestones") == {"family-0000002", "family-0000004"}
    assert names(run / "milestones" / "family-0000002") == {"plain", "gated", "conv"}


def test_write_after__a_failure_is_a_line_and_costs_no_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "teacher")
    (line,) = write_after(run, lambda _: None)
    assert line.startswith("students of milestones are not written (") and str(run) in line
    assert left_milestones(run) != [] and len(checkpoints(run / "checkpoints")) == 3


def test_write_left__a_teacher_too_large_for_a_cpu_is_not_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milestones, "MOST_GFLOP_ON_CPU", 0.0)
    monkeypatch.setattr(milestones, "load_backbone", None)  # never called
    assert MilestoneWriter(run, lambda _: None).write_left() == 2
    folder = run / "milestones" / "family-0000004" / "conv"
    record = json.loads((folder / "distill.json").read_text())
    assert record["milestone"]["knn"] is None and "too long" in record["milestone"]["reason"]
    assert "No k-NN scores" in (folder / "README.md").read_text()
    assert load_backbone(folder)[1].width > 0


def test_write_left__nothing_where_the_recipe_does_not_want_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = milestones.read_job(run)
    off = job.recipe.checkpoint.model_copy(update={"export": False})
    quiet = replace(job, recipe=job.recipe.model_copy(update={"checkpoint": off}))
    monkeypatch.setattr(milestones, "read_job", lambda _: quiet)
    assert MilestoneWriter(run, lambda _: None).write_left() == 0
    assert not (run / "milestones").exists()


def test_export_facts__scores_are_in_the_first_card(tmp_path: Path) -> None:
    facts = ExportFacts(64, MEAN, STD, {}, scores={"students": {"small": {"knn": 0.25}}})
    write_backbone(tmp_path / "small", VIT.build().state_dict(), VIT, facts)
    bare = replace(facts, scores={})
    write_backbone(tmp_path / "bare", VIT.build().state_dict(), VIT, bare)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("small", "bare")}
    assert "| this network | 0.250 |" in cards["small"] and "No k-NN scores" in cards["bare"]
