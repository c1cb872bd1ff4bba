"""The benchmark runs every mode through the real loop, with sleeps and with networks."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.command import Run
from tests.support.gpu import CPU_AND_GPU
from tests.support.jobs import HEADS, TINY, run_distill, write_images


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("HEADS", HEADS))
    return path


def run(*words: object) -> dict[str, Any]:
    ended = run_distill("bench", "--steps", "10", "--warmup", "1", "--json", *map(str, words))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.slow
@CPU_AND_GPU
def test_bench__networks_in_every_mode(device: str, recipe: Path, tmp_path: Path) -> None:
    before = set(Path("runs").glob(".bench-*"))
    words = (recipe, f"engine.device={device}", "--steps", "10", "--warmup", "1")
    words += ("--against", "published,separate,saving", "--ranks", 2 if device == "cpu" else 1)
    ended = run_distill("bench", *map(str, words), "--json", str(tmp_path / "b.json"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "seconds of a rank and step" in ended.stdout
    report = json.loads((tmp_path / "b.json").read_text())
    assert set(report["modes"]) == {"ours", "published", "separate one", "separate two"}
    for found in report["modes"].values():
        step = found["step_s"]
        assert 0 < step["min"] <= step["median"] <= step["max"]
        assert 0 < found["utilisation"] <= 1 and len(found["teach_s"]) == report["ranks"]
        rows = found["timeline"]  # a rank far ahead or behind may learn nothing in rank 0's step
        assert {span[2] for row in rows for span in row} >= {"teaching", "learning"}
        for row in rows:  # of each rank: no time is counted twice, or not at all
            assert row[0][0] == 0.0
            assert all(stop == start for (_, stop, *_), (start, *_) in pairwise(row))
    sent = {name: found["exchange_bytes_max"] for name, found in report["modes"].items()}
    assert sent["separate one"] == 0
    if device == "cpu":  # one GPU trains all students: nothing is sent
        assert 0 < sent["ours"] < sent["published"]
    saving = report["saving"]  # what it costs is the benchmark's business
    assert saving["stall_s"]["median"] > 0 and saving["cost_s"]["blocks"] == 1
    assert set(Path("runs").glob(".bench-*")) <= before
    assert report["gain"] > 0 and report["gain_bound"] > 1 and report["mfu"] > 0
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] > 100


@pytest.mark.slow
def test_bench__on_the_recipes_images(recipe: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    report = run(recipe, f"data.sources=[{images}]", "--data", "recipe", "--against", "none")
    assert report["modes"]["ours"]["step_s"]["median"] > 0
    assert not (Path("bad_samples.jsonl")).exists()


@pytest.mark.slow
def test_bench__sleeps_between_the_recipes_images(recipe: Path, tmp_path: Path) -> None:
    """The loader works beside a trainer that takes no core from it."""
    images = write_images(tmp_path / "images")
    words = ("--data", "recipe", "--sleep", "0.2", "--against", "none")
    ours = run(recipe, f"data.sources=[{images}]", *words)["modes"]["ours"]
    assert all(0 < waited < ours["step_s"]["max"] for waited in ours["loader_s"])


def test_bench__sleeps_take_the_planned_time(recipe: Path) -> None:
    report = run(recipe, "--sleep", "0.2", "--against", "published")
    ours = report["modes"]["ours"]
    assert ours["predicted_step_s"] == pytest.approx(0.2)
    assert (
        ours["step_s"]["median"] >= 0.19
    )  # sleeps never end early; how late is not a test's business


def test_bench__says_what_is_wrong(distill: Run, recipe: Path) -> None:
    for words, message in (
        (("--slow", "1=2"), "--slow needs --sleep"),
        (("--jitter", "2%"), "--jitter needs --sleep"),
        (("--jitter", "2", "--sleep", "1"), "--jitter 2: not a percentage"),
        (("--slow", "x", "--sleep", "1"), "--slow x: not RANK=FACTOR"),
        (("--data", "mine"), "--data mine: not known"),
        (
            ("--against", "saving", "--sleep", "1"),
            "--against saving: a rank that sleeps has no state to save",
        ),
        (("--against", "yesterday"), "--against yesterday: not known"),
        (("--json", "a.json", "b.json"), "--json a.json b.json: several files"),
    ):
        ended = distill("bench", str(recipe), *words)
        assert ended.code == 2 and message in ended.err


@pytest.mark.slow
def test_bench__a_sleeping_step_with_jitter_takes_what_is_simulated(recipe: Path) -> None:
    """Three ranks, jitter of a fifth, and the third half as slow again; sleeps never end early, so a step never takes less."""
    words = ("--ranks", "3", "--sleep", "0.6", "--jitter", "20%", "--slow", "2=1.5")
    report = run(
        recipe, "schedule.batch=96", "engine.teacher_micro_batch=1", *words, "--against", "none"
    )
    ours = report["modes"]["ours"]
    assert ours["simulated_step_s"] > 1.1 * ours["predicted_step_s"]
    assert ours["step_s"]["median"] == pytest.approx(ours["simulated_step_s"], rel=0.03)
