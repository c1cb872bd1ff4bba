"""Scores of students over the run: rows replace and stay, damage costs its row alone."""

import json
from pathlib import Path

from distill.runfolder.progress import (
    FIGURES,
    FILE,
    ScoredStep,
    add_progress,
    cut_progress,
    read_progress,
)
from tests.support.run_folders import scored_row


def test_add_progress__a_row_of_the_same_step_is_replaced_and_all_others_stay(
    tmp_path: Path,
) -> None:
    assert read_progress(tmp_path) == []
    add_progress(tmp_path, [scored_row("a", 20), scored_row("b", 20)])
    add_progress(tmp_path, [scored_row("a", 10, knn=0.25), scored_row("b", 20, 0.75)])
    assert read_progress(tmp_path) == [
        ScoredStep("a", 10, 0.25, 0.5, 0.125, 0.25),
        ScoredStep("a", 20, None, 0.5, 0.125, 0.25),
        ScoredStep("b", 20, None, 0.75, 0.1875, 0.375),
    ]
    values = {name: value(read_progress(tmp_path)[0]) for name, (_, value) in FIGURES.items()}
    assert values == {
        "class_neighbours": 0.5,
        "patch_neighbours": 0.125,
        "class_cka": 0.25,
        "knn": 0.25,
    }


def test_cut_progress__what_is_trained_anew_has_no_scores(tmp_path: Path) -> None:
    cut_progress(tmp_path, 10)
    assert not (tmp_path / FILE).exists()
    add_progress(tmp_path, [scored_row("a", step) for step in (10, 20, 30)])
    cut_progress(tmp_path, 20)
    assert [each.step for each in read_progress(tmp_path)] == [10, 20]


def test_read_progress__damage_costs_its_row_alone(tmp_path: Path) -> None:
    rows = [
        scored_row("a", 10),
        {"student": "a"},
        {**scored_row("a", 20), "patch": None},
        7,
        scored_row("a", 30),
    ]
    (tmp_path / FILE).write_text(json.dumps(rows))
    assert [each.step for each in read_progress(tmp_path)] == [10, 30]
    (tmp_path / FILE).write_text("[{")
    assert read_progress(tmp_path) == []
    add_progress(tmp_path, [scored_row("a", 40)])
    assert [each.step for each in read_progress(tmp_path)] == [40]
