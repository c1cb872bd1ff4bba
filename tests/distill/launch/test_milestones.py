"""The process that exports milestones: only where it is wanted, beside training, gone with its launcher."""

import time
from pathlib import Path

import pytest

from distill.launch import milestones
from distill.launch.milestones import exporting
from distill.recipe.reader import load_job
from distill.runfolder.events import read_events
from tests.support.jobs import is_running
from tests.support.run_folders import write_run

DEFAULT = load_job("quickstart")[0]
WANTED = load_job("quickstart", ["checkpoint.export=true", "checkpoint.milestones=5"])[0]
SCORED = load_job("quickstart", ["evaluate.every=5"])[0]
PATCH = """
import os, sys, time
from distill.launch import milestones
from distill.evaluate import milestones as writing
class Writer:
    def __init__(self, *_): pass
    def write_left(self):
        BODY
writing.MilestoneWriter = Writer
milestones.follow(*sys.argv[1:])
"""


def test_exporting__starts_nothing_by_default(tmp_path: Path) -> None:
    with exporting(tmp_path, DEFAULT):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_exporting__is_killed_in_the_middle_when_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "open('PID', 'w').write(str(os.getpid())); time.sleep(1000)"
    pid = tmp_path / "pid"
    monkeypatch.setattr(milestones, "CODE", PATCH.replace("BODY", body.replace("PID", str(pid))))
    with exporting(tmp_path, WANTED):
        while not (pid.is_file() and pid.read_text()):
            time.sleep(0.05)
    assert not is_running(int(pid.read_text()))


@pytest.mark.slow
@pytest.mark.slow
def test_exporting__the_process_of_scores_notes_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    body = (
        "import sys\nfrom distill.launch import milestones\nfrom distill.evaluate import at_intervals\n"
        "def fail(*_): raise ValueError('no teacher')\nat_intervals.IntervalScorer.score_due = fail\n"
        "milestones.follow(*sys.argv[1:])"
    )
    monkeypatch.setattr(milestones, "CODE", body)
    before = len(read_events(run))
    with exporting(run, SCORED):
        while len(read_events(run)) == before:
            time.sleep(0.05)
    text = read_events(run)[-1].text
    assert text == "students are not scored at intervals beside training: no teacher"


@pytest.mark.slow
def test_exporting__a_failure_is_an_event_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    monkeypatch.setattr(milestones, "CODE", PATCH.replace("BODY", "raise ValueError('no teacher')"))
    before = len(read_events(run))
    with exporting(run, WANTED):
        while len(read_events(run)) == before:
            time.sleep(0.05)
    event = read_events(run)[-1]
    assert event.kind == "failed"
    assert event.text == "students of milestones are not written beside training: no teacher"
    assert "ValueError: no teacher" in (run / "trackers" / "milestones.txt").read_text()
