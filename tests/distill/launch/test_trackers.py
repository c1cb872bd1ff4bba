"""A tracker that hangs or raises costs its rows, and nothing of the job."""

import json
import time
from pathlib import Path

import pytest

from distill.launch import trackers
from distill.launch.trackers import feeding
from distill.runfolder.events import read_events
from tests.support.jobs import ENVIRONMENT, differing, run_distill, weights_of, write_recipes
from tests.support.run_folders import write_run

PATCH = """
import sys, time
from distill.screen import follower
from distill.launch.trackers import feed
class Bad:
    def __init__(self, *_): pass
    def write(self, row): BODY
    def close(self): print("closed")
follower.TRACKERS = {"tensorboard": Bad}
feed(*sys.argv[1:])
"""


def test_feeding__starts_nothing_for_jsonl(tmp_path: Path) -> None:
    with feeding(tmp_path, ["jsonl", "jsonl"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_feeding__hands_rows_over_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CODE", PATCH.replace("BODY", "print('row', row.step)"))
    monkeypatch.setattr(trackers, "WAIT_S", 120.0)
    run = write_run(tmp_path / "mine", picture=False)
    before = len(read_events(run))
    with feeding(run, ["jsonl", "tensorboard"]):
        pass
    lines = (run / "trackers" / "tensorboard.txt").read_text().splitlines()
    assert lines.count("closed") == 3 and sum(line.startswith("row") for line in lines) == 80
    assert json.loads((run / "trackers" / "tensorboard.json").read_text())["tiny"]["step"] == 600
    assert len(read_events(run)) == before


def test_feeding__ends_a_tracker_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CODE", PATCH.replace("BODY", "time.sleep(1000)"))
    monkeypatch.setattr(trackers, "WAIT_S", 0.5)
    run = write_run(tmp_path / "mine", picture=False)
    started = time.monotonic()
    with feeding(run, ["tensorboard"]):
        is_inside_s = time.monotonic() - started
    event = read_events(run)[-1]
    assert event.kind == "failed"
    assert event.text.startswith("tensorboard did not take all rows within 0 s; `distill log ")
    assert is_inside_s < 30.0 and time.monotonic() - started < 60.0


def test_feeding__notes_a_tracker_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trackers, "CODE", PATCH.replace("BODY", "raise OSError('the server is gone')")
    )
    monkeypatch.setattr(trackers, "WAIT_S", 120.0)
    run = write_run(tmp_path / "mine", picture=False)
    with feeding(run, ["tensorboard"]):
        pass
    text = read_events(run)[-1].text
    assert text.startswith("tensorboard gets no more rows: the server is gone; `distill log ")
    assert "Traceback" in (run / "trackers" / "tensorboard.txt").read_text()


@pytest.mark.slow
def test_job__has_the_same_bits_with_a_tracker_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipes(tmp_path, stage_steps=20, steps=10, save_every=100)
    hidden = tmp_path / "hidden" / "wandb"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no server')")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{hidden.parent}:{Path.cwd()}")
    for name, log in (("quiet", "[jsonl]"), ("tracked", "[jsonl,wandb]")):
        words = (
            "train",
            str(recipe),
            "--out",
            str(tmp_path / "runs"),
            "--name",
            name,
            f"log={log}",
        )
        ended = run_distill(*words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    quiet, tracked = (tmp_path / "runs" / name for name in ("quiet", "tracked"))
    assert weights_of(quiet) and differing(quiet, tracked) == []
    assert "wandb is not installed (no server)" in read_events(tracked)[-1].text
