"""Runs in a folder, and runs beside each other, as tables and as JSON."""

import json
from pathlib import Path

from distill.report.compare import find_runs
from tests.support.command import Run
from tests.support.run_folders import with_summary, write_run


def test_find_runs__in_folders_below_and_not_inside_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "b", picture=False)
    write_run(tmp_path / "sweep" / "a", picture=False)
    (tmp_path / "b" / "students" / "job.json").write_text("{}")
    (tmp_path / ".photographs").mkdir()
    (tmp_path / ".photographs" / "job.json").write_text("{}")
    assert find_runs(tmp_path) == [tmp_path / "b", tmp_path / "sweep" / "a"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


def test_runs__lists_what_is_there(tmp_path: Path, distill: Run) -> None:
    with_summary(write_run(tmp_path / "a", picture=False), conclusion={"text": "good [red]"})
    write_run(tmp_path / "b", state="training", picture=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "job.json").write_text("{")  # as a crash may leave it
    found = json.loads(distill("runs", str(tmp_path), "--json").out)["runs"]
    assert [row["state"] for row in found] == ["finished", "training", "not started"]
    assert found[0]["knn"] == {"teacher": 0.9, "small": 0.81, "tiny": 0.71}
    assert (found[0]["summary"], found[1]["done"], found[2]["s"]) == ("good [red]", 0.73, None)
    text = distill("runs", str(tmp_path)).out
    assert "73%" in text and "not computed" in text and "[red]" in text
    empty = distill("runs", str(tmp_path / "a" / "students"))
    assert (empty.code, empty.out) == (0, f"no run in {tmp_path / 'a' / 'students'}\n")
    assert distill("runs", str(tmp_path / "none")).code == 2


def test_compare__has_keys_and_scores_that_differ(tmp_path: Path, distill: Run) -> None:
    linear = {"small": {"linear": {"value": 0.5, "interval": [0.4, 0.6]}}}
    first = with_summary(write_run(tmp_path / "a", picture=False), scores=linear)
    second = with_summary(
        write_run(tmp_path / "b", peak="5.0e-4", picture=False),
        students={"small": {"knn": 0.86, "loss": 5.0}},
    )
    words = ("compare", str(first), str(second))
    found = json.loads(distill(*words, "--json").out)
    assert found["recipe"]["schedule.lr.peak"] == ["0.001", "0.0005"]
    assert "schedule.batch" not in found["recipe"]
    assert found["scores"]["small k-NN"] == [0.81, 0.86]
    assert found["scores"]["tiny k-NN"] == [0.71, None]
    assert found["scores"]["small linear"][0]["value"] == 0.5
    text = distill(*words).out
    assert "0.860  +0.050" in text and "0.500 (0.400 to 0.600)" in text
    same = distill("compare", str(first), str(first)).out
    assert "no difference" in same
    assert distill("compare", str(first)).code == 2
    assert distill("compare", str(first), str(tmp_path)).code == 2
