"""A student that its faults stopped is not sold as trained: its own steps everywhere, and an exit code."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report.summary import _entry
from distill.runfolder.parked import PARKED_EXIT_CODE
from distill.screen.tables import unfinished_students
from tests.support import jobs
from tests.support.status import STATUS

STUDENT = """\
from torch import nn


class Failing(nn.Module):
    def __init__(self, last_step):
        super().__init__()
        self.width, self.stride, self.steps, self.last_step = 16, 8, 0, last_step
        self.layer = nn.Conv2d(3, 16, 8, 8)

    def forward(self, image):
        if self.training and image.shape[-1] == 32:
            self.steps += 1
            if self.steps > self.last_step:
                raise ValueError("no more of this")
        patches = self.layer(image)
        return patches.mean(dim=(2, 3)), patches
"""
WIDTHS = "ranks: 1, head_widths: {dino_hidden: 16, ibot_hidden: 16}"
PLAIN = f"arch: vit, width: 16, depth: 1, heads: 2, patch: 8, {WIDTHS}"
STUDENTS = f"""\
students:
  - {{name: whole, {PLAIN}}}
  - {{name: early, steps: 12, {PLAIN}}}
  - {{name: never, arch: "failing:Failing", args: {{last_step: 0}}, {WIDTHS}}}
  - {{name: late, arch: "failing:Failing", args: {{last_step: 14}}, {WIDTHS}}}
"""
STEPS = {"whole": 30, "early": 12, "late": 10}  # late keeps the state of the last save
NEVER = "never is parked since step 0, never trained, not exported"
LATE = "late is parked since step 14, trained for 10 steps"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = jobs.write_recipes(
        tmp_path_factory.mktemp("parked"), stage_steps=10, steps=30, save_every=10
    )
    (path.parent / "failing.py").write_text(STUDENT)
    text = path.read_text()
    start, end = text.index("students:"), text.index("data:")
    path.write_text(text[:start] + STUDENTS + text[end:])
    return path


def test_summary__of_a_student_still_to_be_trained_is_refused(tmp_path: Path) -> None:
    stopped = replace(STATUS, state="stopped", resume_command="distill train tiny")
    with pytest.raises(UserError, match="small is not exported yet, the run has not fin") as found:
        _entry(tmp_path, "small", stopped)
    assert found.value.fix == "Let the run finish: distill train tiny"
    untrained = {"loss": None, "parked": None, "steps": 0, "knn": None}
    assert _entry(tmp_path, "small", replace(STATUS, state="finished")) == untrained
    summary = {"students": {"small": untrained, "tiny": {"steps": 3, "parked": None}}}
    assert unfinished_students(summary) == ["small was never trained, not exported"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**jobs.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@pytest.fixture(scope="module")
def ended(recipe: Path) -> subprocess.CompletedProcess[str]:
    return run(recipe.parent, "train", recipe.name, "--plain")


def record_of(tiny: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((tiny / "students" / name / "distill.json").read_text()))


@pytest.mark.slow
def test_train__says_which_students_are_parked_and_exports_none_that_was_never_trained(
    ended: subprocess.CompletedProcess[str], recipe: Path
) -> None:
    assert ended.returncode == PARKED_EXIT_CODE, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1][10:] == f"finished: {NEVER}; {LATE}"
    assert f"{LATE}: ValueError: no more of this" in ended.stdout
    tiny = recipe.parent / "runs/tiny"
    assert {path.name for path in (tiny / "students").iterdir()} == STEPS.keys()
    for name, steps in STEPS.items():
        record = record_of(tiny, name)
        assert record["steps"] == steps
        assert f", {steps} steps)\n" in (tiny / "students" / name / "README.md").read_text()
        assert ("parked" in record) == (name == "late")
    assert record_of(tiny, "late")["parked"] == "since step 14: ValueError: no more of this"
    summary = json.loads((tiny / "summary.json").read_text())["students"]
    assert {name: entry["steps"] for name, entry in summary.items()} == {**STEPS, "never": 0}
    assert summary["never"]["parked"] == {"step": 0, "reason": "ValueError: no more of this"}
    assert summary["never"]["knn"] is None and summary["late"]["knn"] is not None
    assert summary["late"]["parked"]["step"] == 14
    assert summary["whole"]["parked"] is None and summary["early"]["parked"] is None
    status = jobs.status_of(tiny)
    assert status["state"] == "finished"
    parked = {name for name, each in status["networks"].items() if each["state"] == "parked"}
    assert parked == {"never", "late"}


@pytest.mark.slow
def test_eval_watch_and_export__say_the_same(
    ended: subprocess.CompletedProcess[str], recipe: Path
) -> None:
    del ended
    folder = recipe.parent
    scored = run(folder, "eval", "runs/tiny")
    assert scored.returncode == PARKED_EXIT_CODE, scored.stderr
    assert f"{NEVER}; {LATE}" in scored.stderr
    assert "late is parked since step 14" in " ".join(scored.stdout.split())
    watched = run(folder, "watch", "runs/tiny", "--plain")
    assert watched.stdout.splitlines()[-1][10:] == f"finished: {NEVER}; {LATE}"
    refused = run(folder, "export", "runs/tiny", "--to", "hf", "--student", "never")
    assert refused.returncode == 1
    assert "--student never: was never trained, it is parked since step 0" in refused.stderr


@pytest.mark.slow
def test_resume__keeps_them_parked_and_every_bit(
    ended: subprocess.CompletedProcess[str], recipe: Path
) -> None:
    del ended
    tiny = recipe.parent / "runs/tiny"
    before = jobs.students_of(tiny)
    again = run(recipe.parent, "train", recipe.name, "--plain")
    assert again.returncode == PARKED_EXIT_CODE, again.stdout + again.stderr
    assert again.stdout.splitlines()[-1][10:] == f"finished: {NEVER}; {LATE}"
    after = jobs.students_of(tiny)
    assert {name: record_of(tiny, name)["steps"] for name in after} == STEPS
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert all(after[name][key].equal(tensor) for key, tensor in weights.items()), name
