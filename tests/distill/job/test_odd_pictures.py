"""A job over every odd kind of picture among good ones runs to its end, and a stop in between changes no bit."""

import json
from pathlib import Path

import pytest

from tests.support.jobs import assert_equal_students, run_and_interrupt, run_distill, write_recipes
from tests.support.odd_pictures import odd_pictures

EVERY = 5  # of the pictures of a kind


@pytest.mark.slow
def test_train__odd_pictures_among_good_ones(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=10, steps=12, save_every=3)
    for index, (name, data) in enumerate(list(odd_pictures().items())[::EVERY]):
        kind = name.split("/")[0]
        folder = tmp_path / "images" / ("across", "along")[index % 2]
        (folder / f"odd{index:03}.{'jpg' if kind == 'jpeg' else kind}").write_bytes(data)
    words = ["train", str(recipe), "--out", str(tmp_path / "stopped"), "data.max_bad_fraction=0"]
    run_and_interrupt(words, tmp_path / "stopped" / "tiny" / "status.json", "family")
    again = run_distill(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "UserWarning" not in again.stdout + again.stderr
    words[3] = str(tmp_path / "straight")
    straight = run_distill(*words)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    runs = [tmp_path / "stopped" / "tiny", tmp_path / "straight" / "tiny"]
    assert_equal_students(runs[0], runs[1])
    for run in runs:
        assert not (run / "bad_samples.jsonl").exists()
        assert (run / "features.png").is_file()
        summary = json.loads((run / "summary.json").read_text())
        assert "left_out_of_scores" not in summary and summary["teacher"]["knn"] is not None
        assert "background: mean" in (run / "recipe.resolved.yaml").read_text()
