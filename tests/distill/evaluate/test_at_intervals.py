"""Scores beside training: the newest checkpoint that is due, all students or none, once, and never at the cost of a run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.data.index import ImageIndex
from distill.evaluate import at_intervals, students_over_steps
from distill.evaluate.at_intervals import IntervalScorer, due, forget_later, score_after
from distill.evaluate.students_over_steps import StudentScorer
from distill.job.prepare import Job, JobRequest
from distill.recipe.interval_keys import EvaluateSpec
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.runfolder.events import read_events
from distill.runfolder.manifest import checkpoints
from distill.runfolder.progress import FILE, read_progress
from tests.support.checkpoints import fresh_weights, save_checkpoint
from tests.support.jobs import write_recipes
from tests.support.scored_run import write_run, write_splits

NAMES = ["plain", "gated", "conv"]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    return write_splits(tmp_path_factory.mktemp("images"), (4, 12))


@pytest.fixture
def job(
    tmp_path: Path, splits: tuple[ImageIndex, ImageIndex], monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A run with checkpoints after 3, 4 and 6 steps that scores every 2."""
    path = str(write_recipes(tmp_path / "job", stage_steps=20, steps=6, save_every=2))
    recipe, teacher = load_job(path, ["evaluate.every=2"])
    assert isinstance(recipe, FamilyRecipe)
    (tmp_path / "run").mkdir()
    folder = write_run(tmp_path / "run", splits)
    shutil.rmtree(folder / "students")
    for step in (3, 4, 6):
        save_checkpoint(folder / "checkpoints", step, fresh_weights(recipe, step))
    job = Job(JobRequest(path, (), str(folder), "distill train"), recipe, teacher, "feed")
    for module in (at_intervals, students_over_steps):
        monkeypatch.setattr(module, "read_job", lambda _: job)
    return job


def remove(run: Path, *steps: int) -> None:
    for path, manifest in checkpoints(run / "checkpoints"):
        if manifest.step in steps:
            shutil.rmtree(path)


def test_due__steps_and_times(job: Job) -> None:
    found = list(reversed(checkpoints(job.run_folder / "checkpoints")))
    for index, (path, _) in enumerate(found):
        os.utime(path / "manifest.json", (1000 + 60 * index,) * 2)

    def steps_of(every: int | str, last: tuple[int, float]) -> list[int]:
        return [manifest.step for _, manifest in due(found, EvaluateSpec(every=every), last)]

    assert steps_of(2, (0, 0.0)) == [3, 4, 6] and steps_of(2, (4, 0.0)) == [6]
    assert steps_of(5, (0, 0.0)) == [6] and steps_of(7, (0, 0.0)) == []
    assert steps_of("1min", (0, 0.0)) == [3, 4, 6] and steps_of("2min", (0, 0.0)) == [3, 6]
    assert steps_of("65s", (3, 1000.0)) == [4, 6], "a vote later or earlier is no interval"
    assert steps_of("10min", (3, 1000.0)) == [] == steps_of("1s", (6, 1000.0))


def test_score_due__the_newest_with_the_figures_of_over_steps(job: Job) -> None:
    run, lines = job.run_folder, list[str]()
    scorer = IntervalScorer(run, lines.append)
    assert scorer.score_due() and not scorer.score_due()
    assert [(each.step, each.student) for each in read_progress(run)] == [(6, n) for n in NAMES]
    written = json.loads((run / FILE).read_text())
    event = read_events(run)[-1]
    assert event.kind == "skipped" and "step 3, 4" in event.text and "= 2;" in event.text
    remove(run, 3)
    students_over_steps.students_over_steps(run, lines.append)
    both = json.loads((run / FILE).read_text())
    assert [each["step"] for each in both] == [4] * 3 + [6] * 3 and both[3:] == written
    remove(run, 4, 6)
    recipe = job.recipe
    assert isinstance(recipe, FamilyRecipe)
    save_checkpoint(run / "checkpoints", 8, fresh_weights(recipe, 8))
    assert scorer.score_due()
    assert [each.step for each in read_progress(run)] == [4] * 3 + [6] * 3 + [8] * 3
    assert len(read_events(run)) == 1, "noted once"


def test_score_due__an_end_in_the_middle_leaves_nothing_and_a_resume_scores_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, right, calls = job.run_folder, StudentScorer.score, list[str]()

    def dying(self: StudentScorer, step: int, name: str, backbone: object) -> object:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(self, step, name, backbone)  # type: ignore[arg-type]

    monkeypatch.setattr(StudentScorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        IntervalScorer(run, lambda _: None).score_due()
    assert read_progress(run) == []
    monkeypatch.setattr(StudentScorer, "score", right)
    assert IntervalScorer(run, lambda _: None).score_due()
    remove(run, 6)  # it goes on from step 4
    forget_later(run)
    assert read_progress(run) == []
    assert IntervalScorer(run, lambda _: None).score_due()
    assert [each.step for each in read_progress(run)] == [4] * 3


def test_score_due__a_checkpoint_that_is_gone_is_left_for_a_newer_one(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, spec: object) -> None:
        raise FileNotFoundError(path)

    scorer, right = IntervalScorer(job.run_folder, lambda _: None), at_intervals.load_ema
    monkeypatch.setattr(at_intervals, "load_ema", gone)
    assert not scorer.score_due() and read_progress(job.run_folder) == []
    monkeypatch.setattr(at_intervals, "load_ema", right)
    assert scorer.score_due()


def test_score_after__the_last_step_is_scored_though_its_interval_is_not_over(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = job.recipe
    assert isinstance(recipe, FamilyRecipe)
    rare = replace(job, recipe=recipe.model_copy(update={"evaluate": EvaluateSpec(every=100)}))
    monkeypatch.setattr(at_intervals, "read_job", lambda _: rare)
    assert not IntervalScorer(job.run_folder, lambda _: None).score_due()
    assert score_after(job.run_folder, lambda _: None) == []
    assert [each.step for each in read_progress(job.run_folder)] == [6] * 3
    off = replace(job, recipe=recipe.model_copy(update={"evaluate": EvaluateSpec()}))
    monkeypatch.setattr(at_intervals, "read_job", lambda _: off)
    (job.run_folder / FILE).unlink()
    assert score_after(job.run_folder, lambda _: None) == [] == read_progress(job.run_folder)


def test_score_after__a_failure_is_a_line_and_costs_no_run(job: Job) -> None:
    shutil.rmtree(job.run_folder / "teacher")
    (line,) = score_after(job.run_folder, lambda _: None)
    assert line.startswith("students are not scored at intervals (") and "tries again" in line


def test_score_due__what_cannot_be_scored_is_an_event_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_intervals, "MOST_GFLOP_ON_CPU", 0.0)
    scorer = IntervalScorer(job.run_folder, lambda _: None)
    assert not scorer.score_due() and not scorer.score_due()
    (event,) = read_events(job.run_folder)
    assert event.text.endswith("the teacher takes too long on a CPU")
